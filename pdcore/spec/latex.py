r"""The derivation of an attention in LaTeX: the regression, its dual, and the expansion.

The derivation follows Nguyen et al. (2023): one head is a support vector regression fitted on
its keys, and attention is the support vector expansion of its solution. Indices count from 0, as
in the arrays: query i is at position p = i + offset, and key j at position j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .attention_spec import AttentionSpec, positive_semidefinite
from .kernels import (
    Cosine,
    Exponential,
    FeatureMap,
    Gaussian,
    RandomFeatures,
)
from .latex_text import (
    escape,
    latex_number,
    mask_note,
    parameter_declaration,
    ranges,
    shifted,
    tidy_numbers,
    wrapped,
)
from .normalizations.base import Identity
from .normalizations.batch import Batch
from .normalizations.convolution import Convolution
from .statistics import Mean, Moments

__all__ = ["align_environment", "derivation_latex", "sections"]


def derivation_latex(spec: AttentionSpec) -> str:
    r"""Derive an attention from its regression.

    Parameters
    ----------
    spec : AttentionSpec
        The attention. The formulas of its kernel and normalization are their `latex`.

    Returns
    -------
    str
        An ``align*`` environment: the training points, T, kappa and h of the spec; the primal
        problem; its dual; the attention of query i. It needs no package but amsmath.

    Examples
    --------
    >>> from pdcore import parse
    >>> print(derivation_latex(parse("softmax")).splitlines()[0])
    \begin{align*}
    """
    return align_environment([line for lines in sections(spec).values() for line in lines])


def sections(spec: AttentionSpec) -> dict[str, list[str]]:
    """Return the lines of a derivation by section, in order.

    Returns
    -------
    dict
        ``points``, ``choices``, ``primal``, ``dual``, ``attention`` and ``project_choices``, each a
        list of lines of an ``align*`` environment.
    """
    d = _Derivation(spec)
    methods = (d.points, d.choices, d.primal, d.dual, d.attention, d.project_choices)
    return {method.__name__: list(method()) for method in methods}


def align_environment(lines: list[str]) -> str:
    """Return an ``align*`` environment of these lines."""
    body = " \\\\\n".join(f"& {line}" for line in lines)
    return f"\\begin{{align*}}\n{body}\n\\end{{align*}}\n"


class _Derivation:
    """The sections of one spec's derivation; each method yields the lines of one section."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.pooled = spec.heads.largest > 1
        # Rows that see different keys, or have different statistics, have different regressions.
        self.by_row = spec.support.restricts or spec.prefix
        row = "_i" if self.by_row else ""
        self.f, self.h, self.seen = f"f{row}", f"h{row}", f"S{row}"
        self.convolved = isinstance(spec.normalization, Convolution)
        if self.convolved or isinstance(spec.normalization, Identity):
            self.transform = ""  # a convolution leaves queries unchanged
        else:
            self.transform = "T_p" if spec.prefix else "T"
        scale = getattr(spec.kernel, "scale", None)
        self.tau = "D^{-1/2}" if scale is None else latex_number(scale)

    def key(self, index: str) -> str:
        """Write a training input."""
        return rf"\tilde{{k}}_{index}" if self.convolved else rf"{self._key}_{index}"

    @property
    def _key(self) -> str:
        """Write a key, pooled but not convolved."""
        return r"\bar{k}" if self.pooled else "k"

    def value(self, index: str) -> str:
        """Write a value."""
        return rf"\bar{{v}}_{index}" if self.pooled else f"v_{index}"

    def t(self, x: str) -> str:
        """Write T of a row."""
        return f"{self.transform}({x})" if self.transform else x

    def kappa(self, x: str, y: str) -> str:
        """Write kappa(T(x), T(y))."""
        return rf"\kappa({self.t(x)}, {self.t(y)})"

    def phi(self, x: str) -> str:
        """Write Phi(T(x))."""
        return rf"\Phi({self.t(x)})"

    # The spec.

    def points(self) -> Iterator[str]:
        """Yield the training points of a head, and which of them a query sees."""
        support = self.spec.support
        first, *rest = wrapped(str(self.spec))
        yield rf"\textbf{{The attention }} \texttt{{{first}}}"
        yield from (rf"\qquad \texttt{{{line}}}" for line in rest)
        if self.pooled:
            yield from (rf"\quad {line}" for line in self._scales())
            yield (
                r"\quad R_j = \{ m : js \leq m < (j + 1)s,\ k_m \text{ is real} \}, \quad "
                r"R = \{ j : R_j \neq \emptyset \}"
            )
            if self.spec.heads.pool == "first":
                pooled = r"\bar{k}_j = k_m, \quad \bar{v}_j = v_m, \quad m = \min R_j"
            else:
                mean = r"\frac{1}{|R_j|} \sum_{m \in R_j}"
                pooled = rf"\bar{{k}}_j = {mean} k_m, \quad \bar{{v}}_j = {mean} v_m"
            yield rf"\quad {pooled}"
        else:
            yield r"\quad R = \{ j : 0 \leq j < M,\ k_j \text{ is real} \}"
        if isinstance(self.spec.normalization, Convolution):
            yield rf"\quad \tilde{{k}}_j = {self.spec.normalization.latex(self._key)}"
            taps = math.prod(self.spec.normalization.taps)
            share = rf"1 / {taps}" if taps > 1 else "1"
            yield (
                rf"\quad w = \texttt{{weight}} \text{{, or }} {share} \text{{ everywhere "
                r"where a call does not give it}"
            )
            yield (
                rf"\quad \text{{with }} {self._key}_l = 0 \text{{ for }} l \notin R \text{{; "
                r"a query has no neighbours, and is not convolved}"
            )
        if not support.restricts:
            yield rf"\quad {self.seen} = R{mask_note(self.pooled)}"
            return
        yield rf"\quad {self.seen} = \{{ j \in R : {self._allowed()} \}}{mask_note(self.pooled)}"
        yield r"\quad p = i + \text{offset, the position of query } i"

    def _scales(self) -> list[str]:
        heads = self.spec.heads
        if heads.half is not None:
            last = r"\lfloor H / 2 \rfloor"
            scaled = rf"s = {heads.half} \text{{ for the last }} {last} \text{{ of }} H"
            return [rf"{scaled} \text{{ key heads, }} s = 1 \text{{ for the others}}"]
        groups = heads.groups(len(heads.scales))
        if len(groups) == 1:
            return [f"s = {groups[0][0]}"]
        lines = [rf"s = {s} \text{{ for key heads {ranges(heads)}}}" for s, heads in groups]
        return lines if max(map(len, lines)) > 60 else [r", \quad ".join(lines)]

    def _allowed(self) -> str:
        """Write the condition on the position of a visible key."""
        support = self.spec.support
        first, last = ("js", "js + s - 1") if self.pooled else ("j", "j")
        low = "" if support.left == float("inf") else shifted("p", -int(support.left))
        high = "" if support.ahead == float("inf") else shifted("p", int(support.ahead))
        if low and high and first == last:
            return rf"{low} \leq j \leq {high}"
        bounds = [rf"{low} \leq {first}"] if low else []
        bounds += [rf"{last} \leq {high}"] if high else []
        return r",\ ".join(bounds)

    def choices(self) -> Iterator[str]:
        """Yield T, kappa and h."""
        spec = self.spec
        if self.transform:
            yield rf"\quad {self.t('x')} = {tidy_numbers(spec.normalization.latex())}"
            yield from (rf"\quad {line}" for line in self._statistics())
        yield rf"\quad \kappa(x, y) = \Phi(x)^\top \Phi(y) = {tidy_numbers(spec.kernel.latex())}"
        for term in spec.terms:
            yield rf"\quad \text{{times }} e^{{{term.latex()}}}, \quad p = i + \text{{offset}}"
        if isinstance(spec.kernel, RandomFeatures):
            yield (
                rf"\quad \tau = {self.tau}, \quad \Omega_{{fd}} \sim N(0, 1) "
                rf"\text{{ drawn once from seed {spec.kernel.seed}}}"
            )
        if not positive_semidefinite(spec):
            yield (
                r"\quad \text{(} \Phi \text{ exists only where } \kappa \text{ is positive "
                r"semidefinite; elsewhere the last lines are a definition)}"
            )
        normaliser = {
            "sum": rf"\sum_{{l \in {self.seen}}} {self.kappa('x', self.key('l'))}",
            "count": f"|{self.seen}|",
            "one": "1",
        }[spec.normaliser]
        yield rf"\quad {self.h}(x) = {normaliser}{self._sink()}"
        if spec.parameters():
            for verb, required in (("gives", True), ("may give", False)):
                parameters = [p for p in spec.parameters() if (p.default is None) is required]
                if parameters:
                    declared = r",\ ".join(
                        parameter_declaration(p.name, p.shapes) for p in parameters
                    )
                    yield rf"\quad \text{{arrays that a call {verb}: }} {declared}"

    def _sink(self) -> str:
        """Write what the sink adds to h, the term of a point that is no support vector."""
        sink = self.spec.sink
        if sink is None:
            return ""
        s = latex_number(sink) if isinstance(sink, float) else "s"
        where = "" if isinstance(sink, float) else r", \quad s = \texttt{sink}"
        return rf" + e^{{{s}}}{where}"

    def _statistics(self) -> Iterator[str]:
        normalization = self.spec.normalization
        key = self.key("j")
        if (definition := normalization.statistics_latex(key)) is not None:
            yield definition
            return
        statistics = normalization.statistics_state()
        batch = normalization if isinstance(normalization, Batch) else None
        if batch is None and type(statistics) not in (Mean, Moments):
            if statistics is not None:
                name = escape(type(statistics).__name__)
                yield (
                    rf"\text{{by the statistics }} \texttt{{{name}}} \text{{ of the }} "
                    rf"{key},\ j \in R"
                )
            return
        divided = type(statistics) is Moments if batch is None else batch.with_std
        match "sequence" if batch is None else batch.statistics:
            case "running":
                names = r"\mu, \sigma^2" if divided else r"\mu"
                yield rf"{names} \text{{ given by the call}}"
                return
            case "prefix":
                last = "js + s - 1" if self.pooled else "j"
                where = "" if self.spec.support.restricts else r", \quad p = i + \text{offset}"
                yield rf"P = \{{ j \in R : {last} \leq p \}}{where}"
                over, index = "P", "_p"
            case "batch":
                yield r"\text{sums over the sequences } b \text{ of the call too}"
                over, index = "R_b" if not self.pooled else "R^{(b)}", ""
            case _:
                over, index = "R", ""
        total, count = rf"\sum_{{j \in {over}}}", f"|{over}|"
        if batch is not None and batch.statistics == "batch":
            total, count = rf"\sum_b \sum_{{j \in {over}}}", rf"\sum_b |{over}|"
            key = rf"{key}^{{(b)}}"
        mean = rf"\mu{index}"
        variance = rf"\sigma^2{index} = \frac{{1}}{{n}} {total} ({key} - {mean})^2, \quad "
        yield (
            rf"{mean} = \frac{{1}}{{n}} {total} {key}, \quad "
            rf"{variance if divided else ''}n = {count}"
        )

    # The regression.

    def primal(self) -> Iterator[str]:
        """Yield the layer and its primal problem."""
        x, z = self.phi("x"), self.phi(self.key("j"))
        scope = r" (one for every query } i \text{)" if self.by_row else ""
        yield rf"\textbf{{Primal}}\text{{{scope}: a layer with targets }} y_j"
        yield rf"\quad {self.f}(x) = W \frac{{{x}}}{{{self.h}(x)}} + b"
        slack = r"(\xi_{jd} + \xi^{*}_{jd})"
        yield (
            r"\quad \min_{W, b, \xi, \xi^{*}} \ \frac{1}{2} \lVert W \rVert_F^2 + C "
            rf"\sum_{{j \in {self.seen}}} \sum_d {slack}"
        )
        fit = rf"w_d^\top \frac{{{z}}}{{{self.h}({self.key('j')})}} - b_d"
        yield (
            rf"\quad \text{{subject to }} -(\epsilon + \xi^{{*}}_{{jd}}) \leq y_{{jd}} - {fit} "
            r"\leq \epsilon + \xi_{jd}, \quad \xi_{jd}, \xi^{*}_{jd} \geq 0"
        )

    def dual(self) -> Iterator[str]:
        """Yield the dual problem, and the primal solution by its multipliers."""
        j, k_j, k_l = self.seen, self.key("j"), self.key("l")
        gap, other = r"(\alpha_{jd} - \alpha^{*}_{jd})", r"(\alpha_{ld} - \alpha^{*}_{ld})"
        yield r"\textbf{Dual}\text{: multipliers } \alpha_{jd}, \alpha^{*}_{jd}"
        yield (
            r"\quad \max_{\alpha, \alpha^{*}} \ "
            rf"-\frac{{1}}{{2}} \sum_d \sum_{{j, l \in {j}}} {gap} {other} K_{{jl}} "
            rf"+ \sum_d \sum_{{j \in {j}}} \left( y_{{jd}} {gap} - "
            r"\epsilon (\alpha_{jd} + \alpha^{*}_{jd}) \right)"
        )
        yield (
            r"\quad \text{subject to } 0 \leq \alpha_{jd}, \alpha^{*}_{jd} \leq C, \quad "
            rf"\sum_{{j \in {j}}} {gap} = 0 \text{{ for every }} d"
        )
        yield (
            rf"\quad K_{{jl}} = \frac{{{self.kappa(k_j, k_l)}}}{{{self.h}({k_j}) \, "
            rf"{self.h}({k_l})}}, \quad w_d = \sum_{{j \in {j}}} {gap} "
            rf"\frac{{{self.phi(k_j)}}}{{{self.h}({k_j})}}"
        )

    def attention(self) -> Iterator[str]:
        """Yield the expansion at query i, and its closed form."""
        v, k, seen = self.value("j"), self.key("j"), self.seen
        yield (
            r"\textbf{Attention}\text{: the expansion at query } i \text{; in a transformer } v "
            r"\text{ is learned and } b = 0"
        )
        total = rf"\sum_{{j \in {seen}}}"
        vd = r"\bar{v}_{jd}" if self.pooled else "v_{jd}"
        yield (
            rf"\quad o_i = {self.f}(q_i) = {total} \frac{{{self.kappa('q_i', k)}}}"
            rf"{{{self.h}(q_i)}} \, {v}, \quad {vd} = \frac{{\alpha_{{jd}} - "
            rf"\alpha^{{*}}_{{jd}}}}{{{self.h}({k})}}"
        )
        yield from (rf"\quad {line}" for line in self._closed_form(total, v, k))
        empty = rf"{seen} = \emptyset"
        if self.spec.prefix:
            empty += r" \text{ or } P = \emptyset"
        if not _never_zero(self.spec):
            empty += rf" \text{{ or }} {self.h}(q_i) = 0"
        yield rf"\quad o_i = 0 \text{{ where }} {empty}"

    def _closed_form(self, total: str, v: str, k: str) -> Iterator[str]:
        """Yield o_i in the form that is usual for this kernel, where there is one."""
        spec, seen = self.spec, self.seen
        normalization = spec.normalization
        if isinstance(spec.kernel, FeatureMap):
            phi_q, phi_k = self.phi("q_i"), self.phi(k)
            below = {"sum": rf"{phi_q}^\top {total} {phi_k}", "count": f"|{seen}|", "one": ""}
            above = rf"{phi_q}^\top {total} {phi_k} \, {v}^\top"
            divisor = below[spec.normaliser]
            yield (
                rf"o_i^\top = \frac{{{above}}}{{{divisor}}}" if divisor else rf"o_i^\top = {above}"
            )
            return
        plain = spec.plain_exponential and spec.normaliser == "sum"
        if not plain or spec.sink is not None or spec.terms:
            return
        softmax = rf"\mathrm{{softmax}}_{{j \in {seen}}}"
        if not self.transform:
            yield rf"o_i = {total} {softmax}({self.tau} \, q_i^\top {k}) \, {v}"
        elif isinstance(normalization, Batch):
            index = "_p" if spec.prefix else ""
            centre = rf"{self._mean_weight(normalization)}\mu{index}"
            difference = tidy_numbers(f"q_i - {centre}")
            query = difference
            if normalization.with_std:
                scale = rf"\sigma^2{index} + {latex_number(normalization.eps)}"
                query = rf"\frac{{{difference}}}{{{scale}}}"
            yield (
                rf"o_i = {total} {softmax}({self.tau} \, q_i'^\top {k}) \, {v}, \quad q_i' = "
                rf"{query} \text{{ (terms without }} j "
                r"\text{ cancel)}"
            )

    @staticmethod
    def _mean_weight(batch: Batch) -> str:
        if batch.beta == "param":
            return r"\beta \odot "
        return "" if batch.beta == 1.0 else rf"{latex_number(float(batch.beta))}\,"

    def project_choices(self) -> Iterator[str]:
        """Yield the choices of this project that the paper does not make."""
        spec, choices = self.spec, []
        normalization = spec.normalization
        if isinstance(spec.kernel, Exponential) and spec.kernel.softcap is not None:
            choices.append("softcap")
        if spec.sink is not None:
            choices.append("a sink in h, the term of a point that is no support vector")
        choices += [f"{term.word}, a factor of kappa by positions" for term in spec.terms]
        choices += normalization.choices(pooled=bool(self.pooled))
        if self.pooled:
            if spec.heads.pool == "mean":
                choices.append("pooling by means")
            if spec.support.restricts:
                choices.append("a pooled key is seen only if all of its window is allowed")
        if choices:
            yield r"\textbf{Choices of pdcore, not of the paper}"
            yield from (rf"\quad \text{{{choice}}}" for choice in choices)


def _never_zero(spec: AttentionSpec) -> bool:
    """Return whether h is positive wherever a key is visible."""
    always = isinstance(spec.kernel, (Exponential, Gaussian, Cosine))
    return always or spec.normaliser != "sum" or spec.sink is not None
