"""The LaTeX of a spec is well formed, and says what is special about that spec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from pdcore import (
    PRESETS,
    AttentionSpec,
    Exponential,
    KeySet,
    Normalization,
    Parameter,
    PointwiseKernel,
    parse,
)

KERNELS = [
    "softmax",
    "softmax(scale=0.00003)",
    "softmax(softcap=20)",
    "gaussian(gamma=0.3)",
    "gaussian(1e-5)",
    "cosine",
    "polynomial",
    "polynomial(4,0,0.5)",
    "linear",
    "relu",
    "random_features(32,seed=3)",
]
NORMALISERS = ["", "h(count)", "h(one)"]
NORMALIZATIONS = [
    "",
    "bn",
    "bn(beta=-0.5,eps=3e-7)",
    "bn(beta=param,statistics=batch)",
    "bn(statistics=running)",
]
HEADS = ["", "sh(1,1,2,2)", "sh(2,1,2,pool=first)", "sh(3)"]
SUPPORTS = ["", "causal", "sparse(3,4)", "sparse(inf,2)", "causal+sparse(8,8)"]


def joined(*words: str) -> str:
    text = "+".join(word for word in words if word)
    if "causal" in text and "bn" in text and "running" not in text:
        text = text.replace("bn(", "bn(allow_leak=true,").replace("bn+", "bn(allow_leak=true)+")
    return text


# Every pair with the kernel, and every pair of the others.
SPECS = sorted(
    {
        *PRESETS,
        *(
            joined(k, x)
            for k in KERNELS
            for x in (*NORMALISERS, *NORMALIZATIONS, *HEADS, *SUPPORTS)
        ),
        *(joined("softmax", n, s, h) for n in NORMALIZATIONS for s in HEADS for h in SUPPORTS),
        *(joined("bn(statistics=prefix)", s, h) for s in HEADS for h in SUPPORTS),
    }
    | {f"{k}+h(sum,sink=param)" for k in KERNELS[:-3]}
    | {"sh(" + ",".join("12" * 16) + ")+causal"}
)


@dataclass(frozen=True)
class Bounded(PointwiseKernel):
    word = "bounded_kernel"

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("shift", (("H",),)),)

    def log_kappa(self, s: Any, dim: int, **params: Any) -> Any:
        return s - params["shift"]

    def latex(self) -> str:
        return r"\exp(x^\top y - c)"


@dataclass(frozen=True)
class Convolved(Normalization):
    word = "convolved"

    def statistics_state(self) -> KeySet:
        return KeySet()

    def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x

    def latex(self) -> str:
        return r"x - \sum_t c_t k_{j - t}"


OWN = AttentionSpec(kernel=Bounded(), normalization=Convolved())


def lines(text: str) -> list[str]:
    return text.splitlines()[1:-1]


def balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize("spec", [*SPECS, OWN], ids=str)
def test_it_is_well_formed(spec: str | AttentionSpec) -> None:
    text = (parse(spec) if isinstance(spec, str) else spec).latex()
    assert text.startswith("\\begin{align*}\n")
    assert text.endswith("\n\\end{align*}\n")
    rows = lines(text)
    for last, row in enumerate(rows, 1 - len(rows)):
        assert row.startswith("& ")
        assert row.endswith(r" \\") is (last != 0)
        assert row.count("&") == 1
        assert balanced(row), row
        assert row.count(r"\left(") == row.count(r"\right)")
        if r"\texttt" not in row:
            assert not re.search(r"\$|%|#|None|\d[eE][-+]?\d|- -|\binf\b", row), row


@pytest.mark.parametrize("spec", [*dict.fromkeys([*PRESETS, *KERNELS]), OWN], ids=str)
def test_every_line_can_be_set(spec: str | AttentionSpec) -> None:
    mathtext = pytest.importorskip("matplotlib.mathtext")
    parser = mathtext.MathTextParser("path")
    text = (parse(spec) if isinstance(spec, str) else spec).latex()
    for row in lines(text):
        row = row.removeprefix("& ").removesuffix(r" \\")
        # These four are LaTeX's, and Matplotlib's small subset has them by other names.
        for ours, theirs in (
            (r"\textbf", r"\text"),
            (r"\texttt", r"\mathtt"),
            (r"\lVert", r"\Vert"),
            (r"\rVert", r"\Vert"),
        ):
            row = row.replace(ours, theirs)
        assert parser.parse(f"${row}$").width > 0


def says(spec: str, *parts: str) -> None:
    text = parse(spec).latex()
    for part in parts:
        assert part in text, f"{part} is not in\n{text}"


def test_softmax_is_the_expansion_of_the_exponential_kernel() -> None:
    says(
        "softmax",
        r"\kappa(x, y) = \Phi(x)^\top \Phi(y) = \exp(D^{-1/2}\, x^\top y)",
        r"h(x) = \sum_{l \in S} \kappa(x, k_l)",
        r"f(x) = W \frac{\Phi(x)}{h(x)} + b",
        r"K_{jl} = \frac{\kappa(k_j, k_l)}{h(k_j) \, h(k_l)}",
        r"v_{jd} = \frac{\alpha_{jd} - \alpha^{*}_{jd}}{h(k_j)}",
        r"\mathrm{softmax}_{j \in S}(D^{-1/2} \, q_i^\top k_j) \, v_j",
    )
    assert "pdcore" not in parse("softmax").latex()


def test_every_problem_has_its_constraints() -> None:
    for spec in ("softmax", "causal+bn(statistics=prefix)+sh(1,2)"):
        says(
            spec,
            r"\lVert W \rVert_F^2",
            r"\xi_{jd}, \xi^{*}_{jd} \geq 0",
            r"0 \leq \alpha_{jd}, \alpha^{*}_{jd} \leq C",
            r"(\alpha_{jd} - \alpha^{*}_{jd}) = 0",
        )


def test_batch_normalization_folds_into_the_query() -> None:
    says(
        "bn(beta=0.5)",
        r"T(x) = \frac{x - 0.5\,\mu}{\sqrt{\sigma^2 + 10^{-5}}}",
        r"\mu = \frac{1}{n} \sum_{j \in R} k_j",
        r"h(x) = \sum_{l \in S} \kappa(T(x), T(k_l))",
        r"q_i' = \frac{q_i - 0.5\,\mu}{\sigma^2 + 10^{-5}}",
    )
    says("bn(beta=-0.5)", r"T(x) = \frac{x + 0.5\,\mu}", r"q_i' = \frac{q_i + 0.5\,\mu}")
    says("bn(beta=param)", r"x - \beta \odot \mu", r"\texttt{beta} \text{ of shape } (H)")
    assert "q_i'" not in parse("bn+linear").latex()
    assert "q_i'" not in parse("bn+h(one)").latex()


def test_prefix_statistics_belong_to_the_row() -> None:
    says(
        "causal+bn(statistics=prefix)",
        r"P = \{ j \in R : j \leq p \}",
        r"\mu_p = \frac{1}{n} \sum_{j \in P} k_j",
        r"f_i(x) = W \frac{\Phi(T_p(x))}{h_i(x)} + b",
        r"o_i = 0 \text{ where } S_i = \emptyset \text{ or } P = \emptyset",
    )
    says("bn(statistics=prefix)", r"S_i = R", r"p = i + \text{offset}")


def test_batch_and_running_statistics() -> None:
    says("bn(statistics=batch)", r"\sum_b \sum_{j \in R_b} k_j^{(b)}")
    says("bn(statistics=running)", r"\mu, \sigma^2 \text{ given by the call}", r"(H, D)")


def test_pooled_keys_are_the_training_points() -> None:
    says(
        "sh(1,1,2,2)+causal",
        r"s = 1 \text{ for key heads 0--1}, \quad s = 2 \text{ for key heads 2--3}",
        r"\bar{k}_j = \frac{1}{|R_j|} \sum_{m \in R_j} k_m",
        r"S_i = \{ j \in R : js + s - 1 \leq p \}",
        r"\bar{v}_{jd} = ",
        r"pooling by means",
    )
    says("sh(2,pool=first)", r"\bar{k}_j = k_m", r"m = \min R_j")
    assert r"\bar" not in parse("sh(1,1)").latex()


def test_support_is_in_positions() -> None:
    says("causal", r"S_i = \{ j \in R : j \leq p \}")
    says("sparse(3,4)", r"p - 3 \leq j \leq p + 4")
    says("sparse(0,inf)", r"p \leq j \}")
    says("causal+sparse(8,8)", r"p - 8 \leq j \leq p \}")
    says("sh(2)+sparse(3,4)", r"p - 3 \leq js,\ js + s - 1 \leq p + 4")


def test_normalisers() -> None:
    says("linear", r"\frac{\Phi(q_i)^\top \sum_{j \in S} \Phi(k_j) \, v_j^\top}{\Phi(q_i)^\top")
    says("linear+h(count)", "h(x) = |S|", r"v_j^\top}{|S|}")
    says("causal+linear+h(one)", "h_i(x) = 1", r"o_i^\top = \Phi(q_i)^\top")
    says("relu", r"\text{ or } h(q_i) = 0")
    assert "h(q_i) = 0" not in parse("softmax").latex()


def test_a_sink_is_a_term_of_h() -> None:
    says(
        "bn+h(sum,sink=param)",
        r"h(x) = \sum_{l \in S} \kappa(T(x), T(k_l)) + e^{s}, \quad s = \texttt{sink}",
        r"\texttt{sink} \text{ of shape } (H_q)",
        "a sink in h, the term of a point that is no support vector",
    )
    says("polynomial+h(sum,sink=-0.5)", r"\kappa(x, k_l) + e^{-0.5}")
    text = parse("h(sum,sink=0)").latex()
    assert "softmax}_{j" not in text
    assert "h(q_i) = 0" not in text


def test_choices_of_the_project_are_named_as_such() -> None:
    own = "Choices of pdcore, not of the paper"
    says("softmax(softcap=20)", own, "softcap")
    says("bn", own, r"10^{-5} \text{ added to the variance}")
    says("bn(statistics=running)+sh(1,2)", own, "running statistics", "over pooled keys")
    for spec in ("linear", "gaussian(gamma=1)", "sparse(3,4)", "causal"):
        assert own not in parse(spec).latex()


def test_only_where_kappa_is_positive_semidefinite_there_is_a_phi() -> None:
    note = "positive semidefinite"
    assert note in parse("softmax(softcap=20)").latex()
    assert note in OWN.latex()
    assert note not in parse("cosine").latex()


def test_user_kernels_and_normalizations_state_themselves() -> None:
    text = OWN.latex()
    assert r"\texttt{bounded\_kernel+convolved}" in text
    assert r"T(x) = x - \sum_t c_t k_{j - t}" in text
    assert r"\texttt{KeySet}" in text
    assert r"\texttt{shift} \text{ of shape } (H)" in text


def test_long_specs_are_broken_between_words() -> None:
    spec = "sh(1,1,2,2)+random_features(count=32,seed=3)+bn(beta=param,statistics=running)+causal"
    widths = [len(t) for t in re.findall(r"\\texttt\{([^}]*)\}", parse(spec).latex())]
    assert max(widths) < 80


def test_equal_specs_have_equal_derivations() -> None:
    assert AttentionSpec(kernel=Exponential()).latex() == parse("exponential").latex()


@pytest.mark.parametrize(
    ("spec", "lines"),
    [
        ("conv1d", [r"\sum_{t = 0}^{2} w_t \odot k_{j + t - 1}", r"\text{, or } 1 / 3 \text{"]),
        ("conv1d(4)", [r"\sum_{t = 0}^{3} w_t \odot k_{j + t - 1}", "1 / 4"]),
        ("conv1d(4,causal)", [r"\sum_{t = 0}^{3} w_t \odot k_{j + t - 3}"]),
        ("conv1d(1)", [r"\sum_{t = 0}^{0} w_t \odot k_{j + t}", r"\text{, or } 1 \text{"]),
        ("conv2d(7,9,size=5)", [r"w_{ut} \odot k_{j + 9(u - 2) + t - 2}", "1 / 25"]),
        ("conv1d", [r"\text{arrays that a call may give: } \texttt{weight}"]),
        (
            "iebn",
            [
                r"a = \texttt{slope},\ c = \texttt{shift}",
                r"\mu = \frac{1}{n} \sum_{j \in R} k_j",
                r"\text{arrays that a call gives: } \texttt{slope}",
                "queries get its gate",
                r"\text{the value } 10^{-5} \text{ added to the variance}",
            ],
        ),
        (
            "iebn(beta=0.5)+sh(2)",
            [r"\sum_{j \in R} \bar{k}_j", "the weight of the mean", "statistics over pooled keys"],
        ),
        (
            "mixture(3,steps=5,seed=7)",
            [
                r"\sum_{c=1}^{3}",
                "added to the variance",
                r"by 5 steps of EM on the } k_j,\ j \in R",
                "from centres of seed 7",
            ],
        ),
    ],
)
def test_normalizations_say_where_their_letters_come_from(spec: str, lines: list[str]) -> None:
    text = parse(spec).latex()
    for line in lines:
        assert line in text
