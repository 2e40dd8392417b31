"""The specification of an attention, and the grammar that it is written in.

An attention is a choice of kernel, normaliser, normalization, head scaling and support. Each
word of a spec string sets one of these axes; the order of words does not matter.

>>> spec = parse("bn + sh(1,1,2,2)")
>>> print(spec)
softmax+bn+sh(1,1,2,2)
>>> parse(str(spec)) == spec
True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from ..errors import SpecError, UnsupportedError, nearest
from .expression import KEY_LABEL, QUERY_LABEL
from .grammar import bind_arguments, build, read_arguments, read_words
from .heads import HeadScaling
from .kernel_base import FeatureMap, Kernel, Parameter, PointwiseKernel
from .kernels import Cosine, Exponential, Gaussian, Polynomial
from .normaliser import SINK, check_normaliser, checked_sink, normaliser_word, read_normaliser
from .normalizations.base import Identity, Normalization
from .normalizations.batch import Batch
from .parts import check_final, check_head_axes, check_scalars
from .support import Support
from .terms import TERMS, Term, check_terms
from .vocabulary import find_kernel, find_normalization, kernel_words, normalization_words

__all__ = ["PRESETS", "AttentionSpec", "as_spec", "parse", "positive_semidefinite"]

#: Specs worth knowing, each with a short description.
PRESETS: Mapping[str, str] = {
    "softmax": "scaled dot-product attention",
    "linear": "linear attention, phi = elu + 1",
    "sparse(64,64)": "softmax over a window of positions",
    "bn": "Attention-BN: queries and keys batch-normalized by the key statistics",
    "sh(1,1,2,2)": "Attention-SH: four heads, two of them fitted on pairs of pooled keys",
    "bn+sh(1,1,2,2)": "Attention-BN+SH",
    "causal+bn(statistics=prefix)": "causal Attention-BN by prefix statistics",
}


@dataclass(frozen=True)
class AttentionSpec:
    """The specification of an attention: frozen, hashable, picklable, with scalar fields only.

    ``str(spec)`` is the canonical string, and ``parse(str(spec)) == spec``.

    Parameters
    ----------
    kernel : Kernel
        kappa(x, y); `Exponential` (softmax) by default.
    normaliser : {"sum", "count", "one"}
        h: the sum of kappa over the visible keys, their number, or 1.
    normalization : Normalization
        T(x); `Identity` by default.
    heads : HeadScaling
        The scale of each key head.
    support : Support
        Which keys a query may see by position: causal, and a window.
    sink : float, "param" or None
        s of ``h(sum)``, which adds exp(s) to the sum: a number for all query heads, or
        ``params["sink"]`` (Hq,). None adds nothing.
    terms : tuple of Term
        Terms of log kappa that are functions of positions or labels, such as `Alibi`.

    Raises
    ------
    SpecError
        When an argument does not make sense.
    UnsupportedError
        When the combination is not supported: statistics of the future under causal, prefix
        statistics with a kernel that is no function of inner products, a signed kernel with
        ``h(sum)``, a sink with another normaliser or without log kappa, or windows of pooled keys
        wider than the support.
    """

    kernel: Kernel = field(default_factory=Exponential)
    normaliser: str = "sum"
    normalization: Normalization = field(default_factory=Identity)
    heads: HeadScaling = field(default_factory=HeadScaling)
    support: Support = field(default_factory=Support)
    sink: float | str | None = None
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        for name, base in (
            ("kernel", Kernel),
            ("normalization", Normalization),
            ("heads", HeadScaling),
            ("support", Support),
        ):
            value = getattr(self, name)
            if not isinstance(value, base):
                raise TypeError(
                    f"{name}: got {type(value).__name__}, expected pdcore.{base.__name__}"
                )
            check_final(name, value)
            check_scalars(value)
        object.__setattr__(self, "sink", checked_sink(self.sink))
        check_normaliser(self.normaliser, self.sink, self.kernel)
        check_head_axes(self.kernel, self.normalization)
        object.__setattr__(self, "terms", check_terms(self.terms, self.kernel, self.heads))
        names = [p.name for p in self.parameters()]
        if len(set(names)) != len(names):
            raise SpecError(f"the words of {self} declare a parameter of the same name: {names}")
        self._refuse()

    def _refuse(self) -> None:
        normalization, support = self.normalization, self.support
        if self.prefix and not isinstance(self.kernel, PointwiseKernel):
            raise UnsupportedError(
                f"{normalization.word}(statistics=prefix) needs a kernel of inner products, as T "
                "differs from row to row: softmax, with softcap or without, polynomial, or one of "
                f"your own; got {_word(self.kernel)}"
            )
        if support.ahead == 0 and normalization.leaks:
            other = normalization.causal_choice
            raise UnsupportedError(
                f"{_word(normalization)} is computed from keys that "
                f"{'causal' if support.causal else 'a window without keys ahead'} hides, so the "
                f"future leaks: {f'use {other}, or ' if other else ''}permit it with "
                "allow_leak=true"
            )
        if self.heads.largest > support.left + support.right + 1:
            raise UnsupportedError(
                f"sh: a window of {self.heads.largest} pooled keys never fits in "
                f"{_support_words(support)[-1]}: widen it, or use scales up to "
                f"{int(support.left + support.right + 1)}"
            )

    @property
    def plain_exponential(self) -> bool:
        """Whether the kernel is the exponential without softcap."""
        return isinstance(self.kernel, Exponential) and self.kernel.softcap is None

    @property
    def prefix(self) -> bool:
        """Whether statistics are taken row by row, over the keys up to the row's position."""
        return isinstance(self.normalization, Batch) and self.normalization.statistics == "prefix"

    @property
    def shift_cancels(self) -> bool:
        """Whether T is a shift of queries and keys alike, and kappa a function of their difference.

        T then changes no result, so its statistics and parameters are not read.
        """
        shifts = isinstance(self.normalization, Batch) and not self.normalization.with_std
        return shifts and isinstance(self.kernel, Gaussian)

    @property
    def by_label(self) -> bool:
        """Whether log kappa depends on the labels that a call passes."""
        labels = {QUERY_LABEL, KEY_LABEL}
        parts: tuple[Any, ...] = (self.kernel, *self.terms)
        return any(labels & set(part.places) for part in parts)

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declarations of the arrays that a call passes in `params`."""
        sink = (SINK,) if self.sink == "param" else ()
        parts: tuple[Any, ...] = (self.kernel, self.normalization, *self.terms)
        return (*(p for part in parts for p in part.parameters()), *sink)

    def for_heads(self, heads: int, of: str = "heads of k") -> AttentionSpec:
        """Return the spec for a number of key heads: ``sh(half=2)`` with a scale for each of them.

        Parameters
        ----------
        heads : int
            The number of key heads.
        of : str
            What has them, for the message.

        Raises
        ------
        ValueError
            When the spec has another number of scales.

        Examples
        --------
        >>> print(parse("bn+sh(half=2)").for_heads(5))
        softmax+bn+sh(1,1,1,2,2)
        """
        scales = len(self.heads.scales)
        if scales and scales != heads:
            raise ValueError(
                f"spec: got {scales} scales in {self}, expected one for each of the {heads} {of}; "
                "sh(half=...) fits any number of heads"
            )
        fitted = self.heads.for_heads(heads)
        return self if fitted is self.heads else replace(self, heads=fitted)

    def check_keys(self, count: int) -> None:
        """Raise for a number of keys that the normalization of some head does not accept.

        Raises
        ------
        ValueError
            See `Normalization.check_keys`.
        """
        for scale in sorted(set(self.heads.scales)) or (1,):
            try:
                self.normalization.check_keys(-(-count // scale))
            except ValueError as error:
                pooled = f" ({count} keys, pooled by {scale})" if scale > 1 else ""
                raise ValueError(f"{error}{pooled}") from error

    def __str__(self) -> str:
        words = [_word(self.kernel), *map(_word, self.terms)]
        if h := normaliser_word(self.normaliser, self.sink):
            words.append(h)
        if not isinstance(self.normalization, Identity):
            words.append(_word(self.normalization))
        if self.heads != HeadScaling():
            words.append(str(self.heads))
        return "+".join([*words, *_support_words(self.support)])

    def latex(self) -> str:
        """Return the derivation of the attention as LaTeX: primal problem, dual and expansion.

        Returns
        -------
        str
            An ``align*`` environment.
        """
        from .latex import derivation_latex

        return derivation_latex(self)


def as_spec(spec: str | AttentionSpec) -> AttentionSpec:
    """Return a spec, parsed if it is a string."""
    if isinstance(spec, AttentionSpec):
        return spec
    if isinstance(spec, str):
        return parse(spec)
    raise TypeError(
        f"spec: got {type(spec).__name__}, expected a string such as 'softmax+bn' or an "
        f"AttentionSpec{_where_it_belongs(spec)}"
    )


def _where_it_belongs(value: Any) -> str:
    """Return advice for what other libraries take in the place of a spec."""
    if hasattr(value, "dtype"):
        return "; an array is passed by name: mask= (bool, True where a query may attend) or bias="
    return "; causality is a word of it: spec='causal'" if isinstance(value, bool) else ""


def positive_semidefinite(spec: AttentionSpec) -> bool:
    """Return whether kappa is known to be an inner product Phi(x).Phi(y)."""
    kernel = spec.kernel
    return isinstance(kernel, (FeatureMap, Gaussian, Cosine, Polynomial)) or spec.plain_exponential


_AXES = {
    "sh": "head scaling",
    "scaling": "head scaling",
    "sparse": "window",
    "window": "window",
    "causal": "causal",
    "h": "normaliser",
}


@lru_cache(maxsize=1024)
def parse(text: str) -> AttentionSpec:
    """Parse a spec string.

    Parameters
    ----------
    text : str
        Words joined by ``+``: a kernel, a normalization, ``sh(...)``, ``sparse(left,right)``,
        ``causal``, ``h(...)``.

    Raises
    ------
    SpecError
        On an unknown word (with the nearest known one), two words for one axis (naming both),
        or arguments that do not fit.
    UnsupportedError
        When the words make sense but not together; see `AttentionSpec`.

    Examples
    --------
    >>> parse("gaussian(gamma=0.3)+bn(beta=0.5)+sparse(64,inf)").kernel
    Gaussian(gamma=0.3)
    """
    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for word, arguments in read_words(text):
        axis, value = _read_axis(word, arguments)
        if axis in values:
            raise SpecError(f"{source[axis]!r} and {word!r} both set the {axis} of {text!r}")
        values[axis], source[axis] = value, word
    left, right = values.get("window", (math.inf, math.inf))
    normaliser, sink = values.get("normaliser", ("sum", None))
    return AttentionSpec(
        kernel=values.get("kernel", Exponential()),
        normaliser=normaliser,
        normalization=values.get("normalization", Identity()),
        heads=values.get("head scaling", HeadScaling()),
        support=Support("causal" in values, left, right),
        sink=sink,
        terms=tuple(values[word] for word in TERMS if word in values),
    )


def _read_axis(word: str, arguments: str | None) -> tuple[str, Any]:
    """Return the axis that a word sets, and its value there."""
    axis = _AXES.get(word)
    if word in TERMS:
        return word, build(word, TERMS[word], arguments)
    if axis is None:
        kernel, normalization = find_kernel(word), find_normalization(word)
        if kernel is not None:
            return "kernel", build(word, kernel, arguments)
        if normalization is not None:
            return "normalization", build(word, normalization, arguments)
        known = {*_AXES, *TERMS, *kernel_words(), *normalization_words()}
        raise SpecError(f"unknown word {word!r}; {nearest(word, known)}")
    positional, named = read_arguments(word, arguments, runs=axis == "head scaling")
    if axis == "causal":
        if arguments is not None:
            raise SpecError(f"causal takes no arguments, got ({arguments})")
        return axis, True
    if axis == "normaliser":
        return axis, read_normaliser(arguments, positional, named)
    if axis == "window":
        bound = bind_arguments(word, ("left", "right"), positional, named)
        if len(bound) != 2:
            raise SpecError(
                f"{word}({arguments or ''}): expected left and right, such as "
                f"{word}(64,64) or {word}(64,inf)"
            )
        return axis, (_bound(word, bound["left"]), _bound(word, bound["right"]))
    scales = named.pop("scales", None)
    if scales is not None:
        positional.insert(0, scales)
    pool, half = named.pop("pool", "mean"), named.pop("half", None)
    if named or not (positional or half is not None):
        raise SpecError(
            f"{word}({arguments or ''}): expected one scale per key head, or half=, and at most "
            f"pool=, such as {word}(1,1,2,2), {word}(1*16,2*16), {word}(half=2) or "
            f"{word}(1,2,pool=first)"
        )
    return axis, HeadScaling(tuple(positional), pool, half)


def _bound(word: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise SpecError(f"{word}: {value!r}, expected a whole number >= 0 or inf")
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e16 else repr(value)
    return str(value)


def _word(part: Any) -> str:
    arguments = [
        f"{f.name}={_text(getattr(part, f.name))}"
        for f in fields(part)
        if getattr(part, f.name) != f.default
    ]
    return f"{part.word}({','.join(arguments)})" if arguments else part.word


def _support_words(support: Support) -> list[str]:
    words = ["causal"] if support.causal else []
    if support.left != math.inf or support.right != math.inf:
        words.append(f"sparse({_text(support.left)},{_text(support.right)})")
    return words
