"""The specification: its grammar, its canonical string, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_cases import INF
from strategies import SUPPORTS, specs

import pdcore
from pdcore.errors import SpecError, UnsupportedError
from pdcore.spec import (
    PRESETS,
    AttentionSpec,
    Batch,
    Cosine,
    Elu,
    Exponential,
    FeatureMap,
    Gaussian,
    HeadScaling,
    Identity,
    Kernel,
    Polynomial,
    RandomFeatures,
    Relu,
    Support,
    as_spec,
    parse,
)

# --- round trip -----------------------------------------------------------------------------------

POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
ANY_KERNEL: st.SearchStrategy[Kernel] = st.one_of(
    st.builds(Exponential, scale=st.none() | POSITIVE, softcap=st.none() | POSITIVE),
    st.builds(Gaussian, gamma=POSITIVE),
    st.builds(Cosine, scale=POSITIVE),
    st.builds(
        Polynomial,
        degree=st.integers(1, 50).map(lambda n: 2 * n),
        coef0=st.just(0.0) | POSITIVE,
        scale=st.none() | POSITIVE,
    ),
    st.builds(Elu),
    st.builds(Relu),
    st.builds(
        RandomFeatures,
        count=st.integers(1, 10**6),
        seed=st.integers(0, 2**32 - 1),
        scale=st.none() | POSITIVE,
    ),
)


@given(
    st.integers(1, 5).flatmap(lambda heads: specs(heads, ANY_KERNEL)),
    st.floats(allow_nan=False, allow_infinity=False),
    POSITIVE,
)
def test_a_spec_equals_its_parsed_string(spec: AttentionSpec, beta: float, eps: float) -> None:
    if isinstance(spec.normalization, Batch):
        normalization = dataclasses.replace(spec.normalization, beta=beta, eps=eps)
        spec = dataclasses.replace(spec, normalization=normalization)
    again = parse(str(spec))
    assert again == spec
    assert hash(again) == hash(spec)
    assert str(again) == str(spec)
    copied = pickle.loads(pickle.dumps(spec))  # noqa: S301
    assert copied == spec
    assert hash(copied) == hash(spec)


@given(st.integers(1, 3).flatmap(specs), st.randoms(use_true_random=False))
def test_words_may_come_in_any_order_with_any_white_space(spec: AttentionSpec, rng: Any) -> None:
    words = str(spec).split("+")
    rng.shuffle(words)
    spaced = " +\t".join(word.replace("(", " ( ").replace(",", " , ") for word in words)
    assert parse(f" {spaced}\n") == spec


@given(st.lists(st.integers(1, 3).flatmap(specs), min_size=2, max_size=2))
def test_equal_strings_mean_equal_specs(pair: list[AttentionSpec]) -> None:
    assert (str(pair[0]) == str(pair[1])) == (pair[0] == pair[1])


BN = Batch()
MEANS: dict[str, AttentionSpec] = {
    "softmax": AttentionSpec(),
    "exponential": AttentionSpec(),
    "exponential(0.5, 30)": AttentionSpec(Exponential(0.5, 30.0)),
    "softmax(softcap=2)": AttentionSpec(Exponential(softcap=2.0)),
    "gaussian(0.3)": AttentionSpec(Gaussian(0.3)),
    "cosine": AttentionSpec(Cosine(1.0)),
    "cosine(10)": AttentionSpec(Cosine(10.0)),
    "polynomial": AttentionSpec(Polynomial(2, 1.0)),
    "polynomial(4, 0.5, 2)": AttentionSpec(Polynomial(4, 0.5, 2.0)),
    "elu": AttentionSpec(Elu()),
    "linear": AttentionSpec(Elu()),
    "relu+h(one)": AttentionSpec(Relu(), "one"),
    "random_features(32, 7, scale=0.1)": AttentionSpec(RandomFeatures(32, 7, 0.1)),
    "h(count)": AttentionSpec(normaliser="count"),
    "h(sum)": AttentionSpec(),
    "h(sum, sink=param)": AttentionSpec(sink="param"),
    "bn+h(sum,sink=0)": AttentionSpec(normalization=BN, sink=0),
    "h(sum,sink=-1.5e-3)": AttentionSpec(sink=-1.5e-3),
    "identity": AttentionSpec(),
    "bn": AttentionSpec(normalization=BN),
    "batch": AttentionSpec(normalization=BN),
    "bn(0.5, 1e-3, running)": AttentionSpec(normalization=Batch(0.5, 1e-3, "running")),
    "bn(beta=param)": AttentionSpec(normalization=Batch("param")),
    "bn(allow_leak=true)+causal": AttentionSpec(
        normalization=Batch(allow_leak=True), support=Support(causal=True)
    ),
    "bn(allow_leak=false)": AttentionSpec(normalization=BN),
    "sh(1,1,2,2)": AttentionSpec(heads=HeadScaling((1, 1, 2, 2))),
    "scaling(3)": AttentionSpec(heads=HeadScaling((3,))),
    "sh(scales=3)": AttentionSpec(heads=HeadScaling((3,))),
    "sh(1,2,pool=first)": AttentionSpec(heads=HeadScaling((1, 2), "first")),
    "sh(1*2,2*2)": AttentionSpec(heads=HeadScaling((1, 1, 2, 2))),
    "sh(3, 1 * 2, pool=first)": AttentionSpec(heads=HeadScaling((3, 1, 1), "first")),
    "sh(half=2)": AttentionSpec(heads=HeadScaling(half=2)),
    "sh(pool=first, half=3)": AttentionSpec(heads=HeadScaling((), "first", 3)),
    "causal": AttentionSpec(support=Support(causal=True)),
    "sparse(64,32)": AttentionSpec(support=Support(left=64, right=32)),
    "window(left=1, right=inf)": AttentionSpec(support=Support(left=1)),
    "causal+sparse(4,0)": AttentionSpec(support=Support(True, 4, 0)),
    "gaussian(gamma=0.3)+bn(beta=0.5)+sparse(64,inf)": AttentionSpec(
        Gaussian(0.3), normalization=Batch(0.5), support=Support(left=64)
    ),
    "causal+bn(statistics=prefix)": AttentionSpec(
        normalization=Batch(statistics="prefix"), support=Support(causal=True)
    ),
    "linear+bn": AttentionSpec(Elu(), normalization=BN),
}


@pytest.mark.parametrize("text", MEANS)
def test_what_words_mean(text: str) -> None:
    assert parse(text) == MEANS[text]


CANONICAL = {
    "exponential": "softmax",
    "elu + h( one )": "linear+h(one)",
    "causal+batch(1, 1e-5, allow_leak=true)": "softmax+bn(allow_leak=true)+causal",
    "window(3,inf)+causal": "softmax+causal+sparse(3,inf)",
    "scaling(1,2)+softmax(scale=1)": "softmax(scale=1)+sh(1,2)",
    "sh(2,2,pool=first)": "softmax+sh(2,2,pool=first)",
    "sh(1*16,2*16)": "softmax+sh(1*16,2*16)",
    "sh(1,1*5,2*4,3*1,2*5,pool=first)": "softmax+sh(1*6,2,2,2,2,3,2*5,pool=first)",
    "sh(half=2)+bn": "softmax+bn+sh(half=2)",
    "sh(half=2, pool=first)": "softmax+sh(half=2,pool=first)",
    "bn(beta=-0.5,eps=0.00001)": "softmax+bn(beta=-0.5)",
}


@pytest.mark.parametrize("text", CANONICAL)
def test_the_canonical_string(text: str) -> None:
    assert str(parse(text)) == CANONICAL[text]
    assert parse(CANONICAL[text]) == parse(text)


@pytest.mark.parametrize("text", PRESETS)
def test_presets(text: str) -> None:
    spec = parse(text)
    assert parse(str(spec)) == spec
    assert PRESETS[text]
    latex = spec.latex()
    assert latex.startswith(r"\begin{align*}")
    assert latex.rstrip().endswith(r"\end{align*}")


def test_presets_differ() -> None:
    assert len({parse(text) for text in PRESETS}) == len(PRESETS)


# --- what a spec is -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["kernel", "normalization", "heads", "support", None])
def test_specs_are_frozen(part: str | None) -> None:
    spec = parse("gaussian(0.3)+bn+sh(1,2)+sparse(4,4)")
    frozen = spec if part is None else getattr(spec, part)
    for field in dataclasses.fields(frozen):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, field.name, getattr(frozen, field.name))


def test_specs_are_hashable() -> None:
    table = {parse(text): text for text in MEANS}
    for text in MEANS:
        assert parse(table[parse(text)]) == MEANS[text]
    assert len(table) == len(set(MEANS.values())) < len(MEANS)


def test_as_spec() -> None:
    spec = AttentionSpec(Elu())
    assert as_spec(spec) is spec
    assert as_spec("linear") == spec
    for wrong in (None, 3, b"softmax", ["softmax"]):
        with pytest.raises(TypeError, match=f"spec: got {type(wrong).__name__}, expected a string"):
            as_spec(wrong)  # type: ignore[arg-type]


def test_parameters_are_listed() -> None:
    assert parse("softmax").parameters() == ()
    names = [p.name for p in parse("bn(beta=param,statistics=running)").parameters()]
    assert names == ["beta", "mean", "var"]
    flags = [p.differentiable for p in parse("bn(beta=param,statistics=running)").parameters()]
    assert flags == [True, False, False]


def test_a_spec_without_scales_fits_any_number_of_heads() -> None:
    assert HeadScaling().groups(3) == ((1, (0, 1, 2)),)
    assert HeadScaling((2, 1, 2)).groups(3) == ((2, (0, 2)), (1, (1,)))
    assert HeadScaling((2, 1, 2)).largest == 2
    assert HeadScaling().largest == 1


#: The scales of `sh(half=2)` by the number of key heads.
HALVES = {1: (1,), 2: (1, 2), 3: (1, 1, 2), 4: (1, 1, 2, 2), 5: (1, 1, 1, 2, 2)}


@pytest.mark.parametrize("heads", HALVES)
def test_half_is_the_scale_of_the_last_half_of_the_heads(heads: int) -> None:
    spec = parse("bn+sh(half=2,pool=first)")
    fitted = spec.for_heads(heads)
    assert fitted == AttentionSpec(normalization=BN, heads=HeadScaling(HALVES[heads], "first"))
    assert fitted.for_heads(heads) is fitted
    assert spec.heads.largest == 2
    with pytest.raises(ValueError, match=rf"{heads} scales in .*, expected .* the 9 heads of k"):
        fitted.for_heads(9)


# --- what it refuses ------------------------------------------------------------------------------

WRONG_WORDS: dict[str, list[str]] = {
    "": ["cannot read", "column 1"],
    "softmax+": ["cannot read", "column 9"],
    "+bn": ["column 1"],
    "softmax bn": ["column 9", "'bn'"],
    "softmax-bn": ["column 8", "joined by '+'"],
    "softmax(scale=1": ["column 8"],
    "softmax(scale=(1))": ["column 8"],
    "sofmax": ["unknown word 'sofmax'", "did you mean 'softmax'?", "known:", "polynomial"],
    "bm": ["unknown word 'bm'", "did you mean 'bn'?"],
    "linear+casual": ["unknown word 'casual'", "did you mean 'causal'?"],
    "softmax+linear": ["'softmax' and 'linear' both set the kernel"],
    "softmax+exponential": ["'softmax' and 'exponential' both set the kernel"],
    "bn+batch(beta=0)": ["'bn' and 'batch' both set the normalization"],
    "bn+identity": ["'bn' and 'identity' both set the normalization"],
    "sh(1,2)+scaling(2,1)": ["'sh' and 'scaling' both set the head scaling"],
    "sparse(1,1)+window(2,2)": ["'sparse' and 'window' both set the window"],
    "causal+bn(statistics=prefix)+causal": ["'causal' and 'causal' both set the causal"],
    "sh(2*0)": ["got '2*0'", "from 1 to 1024"],
    "sh(2*x)": ["got '2*x'"],
    "sh(2*1000000)": ["got '2*1000000'"],
    "sh(*2)": ["cannot read the argument ''"],
    "bn(1*2)": ["cannot read the argument '1*2'"],
    "sh(1,2,half=2)": ["scales (1,2) and half=2"],
    "h(sum)+h(one)": ["'h' and 'h' both set the normaliser"],
    "softmax(tau=1)": ["softmax: unknown argument 'tau'", "scale, softcap"],
    "softmax(1,2,3)": ["softmax: got 3 arguments, takes 2: scale, softcap"],
    "linear(1)": ["linear: got 1 arguments, takes 0"],
    "softmax(1,scale=2)": ["softmax: scale is given twice"],
    "softmax(scale=1,scale=2)": ["scale is given twice"],
    "softmax(scale=1,2)": ["'2' follows a named argument"],
    "softmax(scale=)": ["cannot read the argument ''"],
    "softmax(scale=1/2)": ["cannot read the argument '1/2'", "expected a number"],
    "softmax(scale=wide)": ["softmax: scale is 'wide', expected float | None"],
    "softmax(scale=0)": ["softmax: scale is 0.0, expected a finite number > 0"],
    "softmax(scale=inf)": ["scale is inf"],
    "softmax(softcap=-1)": ["softmax: softcap is -1.0"],
    "gaussian": ["gaussian", "gamma"],
    "gaussian(-1)": ["gaussian: gamma is -1.0"],
    "cosine(0)": ["cosine: scale is 0.0"],
    "polynomial(3)": ["polynomial: degree is 3, expected an even number >= 2"],
    "polynomial(0)": ["degree is 0"],
    "polynomial(2.5)": ["polynomial: degree is 2.5, expected int"],
    "polynomial(coef0=-1)": ["polynomial: coef0 is -1.0, expected a finite number >= 0"],
    "random_features(0)": ["random_features: count is 0, expected an int >= 1"],
    "random_features(seed=-1)": ["seed is -1"],
    "random_features(count=true)": ["count is True, expected int"],
    "bn(eps=0)": ["bn: eps is 0.0, expected a finite number > 0"],
    "bn(beta=parm)": ["bn: beta is 'parm', expected a number or 'param'"],
    "bn(beta=inf)": ["beta is inf"],
    "bn(statistics=seqence)": ["bn: statistics is 'seqence'", "did you mean 'sequence'?"],
    "bn(allow_leak=1)": ["bn: allow_leak is 1, expected bool"],
    "sh": ["expected one scale per key head"],
    "sh()": ["expected one scale per key head"],
    "sh(pool=first)": ["expected one scale per key head, or half=", "sh(1*16,2*16)"],
    "sh(1,0)": ["sh: scale 0, expected whole numbers >= 1"],
    "sh(1.5)": ["sh: scale 1.5"],
    "sh(true)": ["sh: scale True"],
    "sh(1,pool=max)": ["sh: pool is 'max'", "known: first, mean"],
    "sh(1,2,size=3)": ["sh(1,2,size=3)", "at most pool="],
    "sparse": ["sparse()", "left and right"],
    "sparse(3)": ["expected left and right"],
    "sparse(1,2,3)": ["sparse: got 3 arguments"],
    "sparse(-1,2)": ["sparse: left is -1, expected a whole number >= 0 or inf"],
    "sparse(1,2.5)": ["sparse: right is 2.5"],
    "window(left=1,right=all)": ["window: 'all', expected a whole number"],
    "causal()": ["causal takes no arguments"],
    "causal(true)": ["causal takes no arguments, got (true)"],
    "h": ["expected h(sum), h(sum,sink=param), h(count) or h(one)"],
    "h(mean)": ["h(mean): expected h(sum), h(sum,sink=param), h(count) or h(one)"],
    "h(sum,0)": ["h(sum,0): expected h(sum), h(sum,sink=param)"],
    "h(sum,sinks=0)": ["h(sum,sinks=0): expected h(sum), h(sum,sink=param)"],
    "h(sum,sink=inf)": ["sink is inf, expected a finite number, or param"],
    "h(sum,sink=true)": ["sink is True"],
    "h(sum,one)": ["expected h(sum)"],
}


@pytest.mark.parametrize("text", WRONG_WORDS)
def test_wrong_words(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    for part in WRONG_WORDS[text]:
        assert part in str(caught.value), str(caught.value)


REFUSED = {
    "bn+causal": ["future leaks", "statistics=prefix", "allow_leak=true", "causal"],
    "bn(statistics=batch)+causal": ["future leaks"],
    "gaussian(1)+bn+causal": ["future leaks"],
    "bn+sparse(4,0)": ["future leaks", "without keys ahead"],
    "linear+bn(statistics=prefix)": ["needs a kernel of inner products", "linear"],
    "cosine(2)+bn(statistics=prefix)": ["with softcap or without, polynomial", "cosine(scale=2)"],
    "gaussian(0.5)+bn(statistics=prefix)": ["gaussian(gamma=0.5)"],
    "sh(1,4)+sparse(1,1)": ["4 pooled keys", "sparse(1,1)", "up to 3"],
    "sh(2)+sparse(0,0)": ["never fits", "up to 1"],
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_combinations(text: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse(text)
    for part in REFUSED[text]:
        assert part in str(caught.value), str(caught.value)


ALLOWED = [
    "bn(statistics=running)+causal",
    "bn(allow_leak=true)+causal",
    "sh(3)+sparse(1,1)",
    "bn(statistics=prefix)",
    "bn+sparse(0,1)",
    "bn(statistics=prefix)+sparse(4,0)",
]


@pytest.mark.parametrize("text", ALLOWED)
def test_supported_combinations(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


WRONG_PARTS: dict[str, tuple[Any, type[Exception], str]] = {
    "kernel name": (lambda: AttentionSpec("softmax"), TypeError, "kernel: got str"),
    "kernel class": (lambda: AttentionSpec(Elu), TypeError, "kernel: got ABCMeta"),
    "normalization": (
        lambda: AttentionSpec(normalization="bn"),
        TypeError,
        "normalization: got str",
    ),
    "heads": (lambda: AttentionSpec(heads=(1, 2)), TypeError, "heads: got tuple"),
    "support": (lambda: AttentionSpec(support="causal"), TypeError, "support: got str"),
    "normaliser": (lambda: AttentionSpec(normaliser="sums"), SpecError, "did you mean 'sum'"),
    "sink name": (lambda: AttentionSpec(sink="params"), SpecError, "sink is 'params'"),
    "sink": (lambda: AttentionSpec(sink=INF), SpecError, "sink is inf, expected a finite"),
    "sink type": (lambda: AttentionSpec(sink=True), SpecError, "sink is True"),
    "sink of one": (
        lambda: AttentionSpec(normaliser="one", sink=0),
        UnsupportedError,
        "h(one) has no sink",
    ),
    "sink of features": (
        lambda: AttentionSpec(Elu(), sink="param"),
        UnsupportedError,
        "h(sum,sink=param): a sink is given as a logarithm",
    ),
    "array": (lambda: AttentionSpec(normalization=Batch(beta=[0.5])), SpecError, "beta is"),
    "scale": (lambda: Exponential(scale="wide"), SpecError, "scale is 'wide'"),
    "bool": (lambda: Cosine(scale=True), SpecError, "scale is True"),
    "nan": (lambda: Gaussian(gamma=math.nan), SpecError, "gamma is nan"),
    "degree": (lambda: Polynomial(degree="two"), SpecError, "degree is 'two'"),
    "count": (lambda: RandomFeatures(count=2.5), SpecError, "count is 2.5"),
    "eps": (lambda: Batch(eps="small"), SpecError, "eps is 'small'"),
    "statistics": (lambda: Batch(statistics=None), SpecError, "statistics is None"),
    "pool": (lambda: HeadScaling((1,), None), SpecError, "pool is None"),
    "no scales": (lambda: HeadScaling((), "first"), SpecError, "without scales"),
    "two patterns": (lambda: HeadScaling((1, 2), half=2), SpecError, "(1,2) and half=2"),
    "half of a half": (lambda: HeadScaling(half=0.5), SpecError, "scale 0.5"),
    "no half": (lambda: HeadScaling(half=0), SpecError, "scale 0"),
    "window": (lambda: Support(left=-INF), SpecError, "left is -inf"),
    "window type": (lambda: Support(right="1"), SpecError, "right is '1'"),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_wrong_parts(case: str) -> None:
    build, error, text = WRONG_PARTS[case]
    with pytest.raises(error) as caught:
        build()
    assert text in str(caught.value)


def test_arrays_are_refused_in_fields() -> None:
    @dataclasses.dataclass(frozen=True)
    class Holding(FeatureMap):
        weights: Any = None
        word = "holding"

        def features(self, x: Any, *, xp: Any, params: Any) -> Any:
            return x

        def latex(self) -> str:
            return ""

    import numpy as np

    with pytest.raises(TypeError, match=r"Holding.weights: got ndarray.*params"):
        AttentionSpec(Holding(np.ones(3)))
    assert isinstance(AttentionSpec(Holding(2.0)).normalization, Identity)


@given(SUPPORTS)
def test_support_knows_whether_positions_matter(support: Support) -> None:
    assert support.restricts == (support != Support())
    assert support.ahead == (0 if support.causal else support.right)


def test_public_names_exist() -> None:
    assert len(set(pdcore.__all__)) == len(pdcore.__all__)
    for name in pdcore.__all__:
        assert getattr(pdcore, name) is not None
