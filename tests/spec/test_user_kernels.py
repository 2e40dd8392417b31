"""Kernels and normalizations that users write.

This module does without postponed annotations, as a notebook does: the fields of its classes are
annotated by types, not by strings.
"""

import dataclasses
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Optional

import array_api_strict
import numpy as np
import pytest
from reference_cases import (
    INF,
    Array,
    Case,
    Strict,
    check_forward,
    check_gradients,
    cotangents,
    normal_case,
    run,
)

import pdcore
from pdcore import (
    AttentionSpec,
    FeatureMap,
    Kernel,
    KeySet,
    Moments,
    Normalization,
    Parameter,
    PointwiseKernel,
    Statistics,
)
from pdcore.errors import NoBackendError, PluginError, SpecError, UnsupportedError
from pdcore.spec import (
    Batch,
    Exponential,
    Expression,
    Identity,
    Relu,
    exp,
    log,
    maximum,
    parse,
    vocabulary,
    where,
)

# --- what is written ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sigmoid(PointwiseKernel):
    """kappa = 1 / (1 + exp(-(slope s + shift))), both for each head."""

    word = "sigmoid_"

    def parameters(self) -> tuple[Parameter, ...]:
        return Parameter("slope", (("H",),)), Parameter("shift", (("H",),), default=0.25)

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        z = params["slope"] * s / dim**0.5 + params["shift"]
        return -(maximum(-z, 0.0) + log(1.0 + exp(-abs(z))))

    def latex(self) -> str:
        return r"\sigma(a x^\top y + b)"


@dataclass(frozen=True)
class Rational(PointwiseKernel):
    """kappa = 1 / (1 + (s - 1)^2 / width)^power."""

    width: float
    power: int = 2
    reach: Optional[float] = None  # noqa: UP045 - as users write it
    word = "rational"

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        smooth = -float(self.power) * log(1.0 + (s - 1.0) ** 2 / self.width)
        if self.reach is None:
            return smooth
        return where(s < self.reach, smooth, -INF)

    def latex(self) -> str:
        return "r(x, y)"


@dataclass(frozen=True)
class Flat(PointwiseKernel):
    """kappa = 2, a constant."""

    word = "flat"

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> float:  # type: ignore[override]
        return math.log(2.0)

    def latex(self) -> str:
        return "2"


@dataclass(frozen=True)
class Softplus(FeatureMap):
    """phi = log(1 + exp(a x)), with a for each head or feature."""

    word = "softplus"

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("slope", (("H",), ("H", "D")), default=1.5),)

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return xp.log1p(xp.exp(params["slope"] * x))

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        slope = cotangent / (1.0 + xp.exp(-params["slope"] * x))
        return slope * params["slope"], {"slope": slope * x}

    def latex(self) -> str:
        return r"\phi(x)^\top\phi(y)"


@dataclass(frozen=True)
class Tilted(FeatureMap):
    """Log phi = x B for a fixed B with more features than x has."""

    word = "tilted"
    log_domain = True

    def matrix(self, x: Any, xp: Any) -> Any:
        return xp.asarray(np.cos(np.arange(5.0 * x.shape[-1]).reshape(-1, 5)), dtype=x.dtype)

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return xp.matmul(x, self.matrix(x, xp))

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        return xp.matmul(cotangent, xp.matrix_transpose(self.matrix(x, xp))), {}

    def latex(self) -> str:
        return r"\phi(x)^\top\phi(y)"


@dataclass(frozen=True)
class Plain(FeatureMap):
    """kappa = x.y, which may be negative."""

    word = "plain"
    signed = True

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        return cotangent, {}

    def latex(self) -> str:
        return r"x^\top y"


@dataclass(frozen=True)
class Unsaid(FeatureMap):
    """A feature map without a pullback."""

    word = "unsaid"

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return xp.exp(x)

    def latex(self) -> str:
        return "e^x"


@dataclass(frozen=True)
class Smoothed(Normalization):
    """T(x) = x + a sum_j exp(c x.k_j) k_j / M: a convolution with the keys themselves."""

    strength: float = 0.2
    word = "smoothed"

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("amount", (("H",),), default=0.5),)

    def statistics_state(self) -> Statistics:
        return KeySet()

    def responses(self, x: Any, state: Any, xp: Any) -> Any:
        keys, mask = state["keys"], state["mask"]
        e = xp.exp(self.strength * xp.matmul(x, xp.matrix_transpose(keys)))
        return xp.where(xp.matrix_transpose(mask), e, xp.zeros_like(e)) / keys.shape[-2]

    def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x + params["amount"] * xp.matmul(self.responses(x, state, xp), state["keys"])

    def apply_vjp(
        self, x: Any, state: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        e, keys = self.responses(x, state, xp), state["keys"]
        moved = xp.matmul(e, keys)
        g = params["amount"] * cotangent
        inner = self.strength * e * xp.matmul(g, xp.matrix_transpose(keys))
        dkeys = xp.matmul(xp.matrix_transpose(e), g) + xp.matmul(xp.matrix_transpose(inner), x)
        return cotangent + xp.matmul(inner, keys), {"keys": dkeys}, {"amount": cotangent * moved}

    def latex(self) -> str:
        return "x + a (k * k)(x)"


class Reweighted(Statistics):
    """A robust mean by three rounds of reweighting with 1 / (1 + |k - mean|^2)."""

    rounds = 3

    def zero(self, like: Any, *, xp: Any) -> Any:
        return {name: xp.zeros_like(x) for name, x in like.items()}

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: Any = None) -> Any:
        weight = xp.ones_like(keys[..., :1])
        if previous is not None:
            far = keys - previous["mean"]
            weight = 1.0 / (1.0 + xp.sum(far * far, axis=-1, keepdims=True))
        if mask is not None:
            weight = xp.where(mask, weight, xp.zeros_like(weight))
        return {
            "weight": xp.sum(weight, axis=-2, keepdims=True),
            "sum": xp.sum(weight * keys, axis=-2, keepdims=True),
        }

    def merge(self, a: Any, b: Any, *, xp: Any) -> Any:
        return {name: a[name] + b[name] for name in a}

    def finalize(self, state: Any, *, xp: Any) -> Any:
        weight = state["weight"]
        return {"mean": state["sum"] / xp.where(weight > 0, weight, xp.ones_like(weight))}


@dataclass(frozen=True)
class Centred(Normalization):
    """T(x) = x - robust mean."""

    allow_leak: bool = False
    word = "centred"

    def statistics_state(self) -> Statistics:
        return Reweighted()

    def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x - state["mean"]

    def apply_vjp(
        self, x: Any, state: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        return cotangent, {"mean": -cotangent}, {}

    def latex(self) -> str:
        return "x - m"


@dataclass(frozen=True)
class Scaled(Normalization):
    """T(x) = g x: no statistics, so nothing leaks."""

    word = "scaled"

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("gain", (("H", "D"),)),)

    def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return params["gain"] * x

    def apply_vjp(
        self, x: Any, state: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        return params["gain"] * cotangent, {}, {"gain": cotangent * x}

    def latex(self) -> str:
        return "g x"


# --- forward and backward -------------------------------------------------------------------------


def spec(
    kernel: Kernel | None = None, normalization: Normalization | None = None, rest: str = ""
) -> AttentionSpec:
    """Join users' parts with words of the grammar."""
    base = parse(rest) if rest else AttentionSpec()
    return replace(
        base,
        kernel=kernel or base.kernel,
        normalization=normalization or base.normalization,
    )


SPECS: dict[str, AttentionSpec] = {
    "sigmoid": spec(Sigmoid()),
    "sigmoid, h(one)": spec(Sigmoid(), rest="h(one)+sh(1,2)"),
    "sigmoid, causal": spec(Sigmoid(), rest="causal+h(count)"),
    "sigmoid, bn": spec(Sigmoid(), Batch(eps=0.3)),
    "rational": spec(Rational(0.5), rest="sparse(3,2)"),
    "rational within reach": spec(Rational(0.5, reach=0.4), rest="h(count)"),
    "flat": spec(Flat(), rest="causal+sh(1,2)"),
    "softplus": spec(Softplus()),
    "softplus, causal": spec(Softplus(), rest="causal+h(count)"),
    "softplus in a window": spec(Softplus(), rest="sparse(2,2)+sh(2,3)"),
    "tilted": spec(Tilted()),
    "tilted, causal": spec(Tilted(), rest="causal+sh(1,3)"),
    "tilted in a window": spec(Tilted(), rest="sparse(2,2)+h(one)"),
    "plain": spec(Plain(), rest="h(one)"),
    "plain, causal": spec(Plain(), rest="h(count)+causal"),
    "plain in a window": spec(Plain(), rest="h(count)+sparse(2,2)+sh(1,2)"),
    "plain, bn": spec(Plain(), Batch(eps=0.3), rest="h(count)"),
    "smoothed": spec(normalization=Smoothed()),
    "smoothed, linear": spec(normalization=Smoothed(), rest="linear+sh(2,3)"),
    "smoothed sigmoid": spec(Sigmoid(), Smoothed(), "h(count)"),
    "scaled": spec(normalization=Scaled(), rest="causal+gaussian(0.3)"),
    "scaled cosine": spec(normalization=Scaled(), rest="cosine"),
}


def call_of(name: str, kind: int) -> Case:
    case = normal_case(SPECS[name], seed=kind, n=5, m=7)
    rng = np.random.default_rng(kind)
    call = dict(case.call)
    if kind == 1:
        call["key_mask"] = rng.random((2, 7)) < 0.8
        call["offset"] = np.asarray([1, -1])
    if kind == 2:
        call["mask"] = rng.random((2, 1, 5, 7)) < 0.7
        if case.spec.kernel.has_log and case.spec.heads.largest == 1:
            call["bias"] = rng.normal(size=(4, 5, 7))
    return replace(case, call=call)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("name", SPECS)
def test_numpy(name: str, kind: int) -> None:
    case = call_of(name, kind)
    out, lse = pdcore.attention(*case.qkv, case.spec, return_lse=True, **case.call)
    check_forward(case, out, lse, pdcore.attention_weights(*case.qkv, case.spec, **case.call))
    again, level, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    check_forward(case, again, level)
    d_out, d_lse = cotangents(case, lse)
    # A kernel of finite reach is discontinuous, so finite differences are no derivative there.
    smooth = check_gradients(case, vjp(d_out, d_lse), d_out, d_lse)
    assert smooth or "reach" in name


@pytest.mark.parametrize("name", SPECS)
def test_array_api_strict(name: str) -> None:
    case = call_of(name, 1)
    xp = array_api_strict
    with np.errstate(all="ignore"):
        out, lse, vjp = Strict().attention_vjp(case.plan(), case.inputs(xp.asarray))
        check_forward(case, out, lse)
        d_out, d_lse = cotangents(case, lse)
        gradients = vjp(xp.asarray(d_out), xp.asarray(d_lse))
    want = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)[2](d_out, d_lse)
    for n, x in want.items():
        size = np.max(np.abs(x), initial=1.0)
        np.testing.assert_allclose(np.asarray(gradients[n]), x, rtol=0, atol=1e-12 * size)


@pytest.mark.parametrize("name", SPECS)
def test_specs_of_users_are_values(name: str) -> None:
    given = SPECS[name]
    copied = pickle.loads(pickle.dumps(given))  # noqa: S301
    assert copied == given
    assert hash(copied) == hash(given)
    assert normal_case(given).plan() == normal_case(copied).plan()
    assert given.kernel.word in str(given)
    assert given.latex()


# --- pointwise kernels ----------------------------------------------------------------------------


def test_parameters_have_defaults_and_gradients() -> None:
    case = normal_case(SPECS["sigmoid"])
    slope = case.call["params"]["slope"]
    got = pdcore.attention(*case.qkv, case.spec, params={"slope": slope})
    want = pdcore.attention(
        *case.qkv, case.spec, params={"slope": slope, "shift": np.full(2, 0.25)}
    )
    np.testing.assert_array_equal(got, want)
    _, _, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    gradients = vjp(np.ones_like(got))
    assert gradients["slope"].shape == gradients["shift"].shape == (2,)
    assert gradients["slope"].all()
    assert gradients["shift"].all()


def test_parameters_belong_to_their_heads() -> None:
    case = normal_case(SPECS["sigmoid"])
    slope = np.asarray([0.5, 2.0])
    both = pdcore.attention(*case.qkv, case.spec, params={"slope": slope})
    for h in range(2):
        alone = pdcore.attention(
            case.q[:, 2 * h : 2 * h + 2],
            case.k[:, h : h + 1],
            case.v[:, h : h + 1],
            case.spec,
            params={"slope": slope[h : h + 1]},
        )
        np.testing.assert_allclose(both[:, 2 * h : 2 * h + 2], alone, rtol=1e-13)


def test_a_constant_kernel_averages() -> None:
    case = normal_case(spec(Flat()))
    out, lse = pdcore.attention(*case.qkv, case.spec, return_lse=True)
    mean = np.repeat(case.v.mean(axis=-2, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=1e-13)
    np.testing.assert_allclose(lse, math.log(14.0), rtol=1e-14)
    _, _, vjp = pdcore.attention_vjp(*case.qkv, case.spec)
    gradients = vjp(np.ones_like(out))
    assert not gradients["q"].any()
    assert not gradients["k"].any()


def test_a_key_with_kernel_value_zero_is_counted() -> None:
    case = normal_case(spec(Rational(0.5, reach=-100.0), rest="h(count)"))
    out, lse = pdcore.attention(*case.qkv, case.spec, return_lse=True)
    assert not out.any()
    np.testing.assert_allclose(lse, math.log(7.0))
    _, level, vjp = pdcore.attention_vjp(*case.qkv, replace(case.spec, normaliser="sum"))
    np.testing.assert_array_equal(level, -INF)
    for x in vjp(np.ones_like(out), np.ones_like(lse)).values():
        assert not x.any()


@dataclass(frozen=True)
class Branching(PointwiseKernel):
    """Asks for the sign of a traced value."""

    word = "branching"

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        return s if s > 0 else -s

    def latex(self) -> str:
        return ""


@dataclass(frozen=True)
class Numeric(Branching):
    """Calls NumPy."""

    word = "numeric"

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        return np.tanh(s)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PerFeature(Branching):
    """Has a parameter that is no scalar."""

    word = "per_feature"

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("metric", (("H", "D"),), default=1.0),)


@dataclass(frozen=True)
class Neither(Kernel):
    """Neither a pointwise kernel nor a feature map."""

    word = "neither"
    has_log = True

    def latex(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (Branching(), ["Branching", "cannot be traced", "where", "FeatureMap"]),
        (Numeric(), ["cannot be traced", "tanh", "FeatureMap"]),
        (PerFeature(), ["per_feature", "'metric'", "one scalar a head"]),
        (Neither(), ["neither", "PointwiseKernel nor a FeatureMap"]),
    ],
)
def test_kernels_that_cannot_run_say_why(kernel: Kernel, says: list[str]) -> None:
    case = normal_case("softmax")
    for call in (pdcore.attention, pdcore.attention_vjp, pdcore.attention_weights, pdcore.explain):
        with pytest.raises(UnsupportedError) as caught:
            call(*case.qkv, AttentionSpec(kernel))
        for text in says:
            assert text in str(caught.value), str(caught.value)


def test_a_formula_is_traced_once() -> None:
    calls = []

    @dataclass(frozen=True)
    class Watched(PointwiseKernel):
        number: int = 0
        word = "watched"

        def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
            calls.append(dim)
            return s / dim

        def latex(self) -> str:
            return ""

    for d in (3, 4, 3, 4):
        case = normal_case(AttentionSpec(Watched(number=1)), d=d)
        pdcore.attention(*case.qkv, case.spec)
        pdcore.attention(*case.qkv, case.spec)
    assert sorted(calls) == [3, 4]


def test_cuda_text_of_a_user_kernel() -> None:
    e = Sigmoid().expression(4)
    assert e.inputs == {"s", "slope", "shift"}
    text = e.cuda()
    for part in ("fmaxf(", "logf(", "expf(", "fabsf(", "slope", "shift"):
        assert part in text
    assert e.derivative("shift").inputs <= e.inputs


# --- feature maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["", "causal", "sparse(2,2)"])
def test_a_feature_map_without_pullback_runs_forward_only(rest: str) -> None:
    case = normal_case(spec(Unsaid(), rest=rest))
    check_forward(case, *pdcore.attention(*case.qkv, case.spec, return_lse=True))
    check_forward(case, *run(Strict(), case, array_api_strict.asarray))
    with pytest.raises(NoBackendError, match="unsaid has no features_vjp"):
        pdcore.attention_vjp(*case.qkv, case.spec)
    with pytest.raises(UnsupportedError, match="unsaid has no features_vjp"):
        pdcore.attention_vjp(*case.qkv, case.spec, backend="numpy")
    with pytest.raises(UnsupportedError, match="features_vjp is not written"):
        Unsaid().features_vjp(None, None, xp=np, params={})
    assert not Unsaid().has_vjp
    assert Softplus().has_vjp


def test_signed_features_need_a_normaliser_that_is_no_sum() -> None:
    with pytest.raises(UnsupportedError, match=r"plain may be negative.*h\(count\) or h\(one\)"):
        AttentionSpec(Plain())
    case = normal_case(spec(Plain(), rest="h(count)"), group=1)
    out, lse = pdcore.attention(*case.qkv, case.spec, return_lse=True)
    np.testing.assert_allclose(out, case.q @ np.swapaxes(case.k, -1, -2) @ case.v / 7.0, atol=1e-13)
    np.testing.assert_allclose(lse, math.log(7.0), rtol=1e-14)
    weights = pdcore.attention_weights(*case.qkv, case.spec)
    assert (weights < 0).any()


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_parameters_of_feature_maps_come_in_either_shape(shape: tuple[int, ...]) -> None:
    case = normal_case(spec(Softplus()))
    slope = np.random.default_rng(4).uniform(0.5, 2.0, size=shape)
    case = replace(case, call={"params": {"slope": slope}})
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    check_forward(case, out, lse)
    d_out, d_lse = cotangents(case, lse)
    assert check_gradients(case, vjp(d_out, d_lse), d_out, d_lse)
    assert vjp(d_out)["slope"].shape == shape


@pytest.mark.parametrize("rest", ["", "causal+h(count)"])
def test_a_long_feature_map_is_still_the_oracle(rest: str) -> None:
    case = normal_case(spec(Softplus(), rest=rest), n=150, m=300, d=40)
    check_forward(case, *pdcore.attention(*case.qkv, case.spec, return_lse=True, **case.call))


# --- normalizations -------------------------------------------------------------------------------


def test_a_normalization_sees_the_whole_key_set() -> None:
    seen: list[Any] = []

    @dataclass(frozen=True)
    class Spying(Smoothed):
        word = "spying"

        def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
            seen.append((x.shape, state["keys"].copy(), state["mask"].copy()))
            return super().apply(x, state, xp=xp, params=params)

    case = normal_case(AttentionSpec(normalization=Spying()), lead=(1,), heads=1, group=2)
    real = np.asarray([[True] * 5 + [False] * 2])
    pdcore.attention(*case.qkv, case.spec, key_mask=real)
    assert [shape for shape, _, _ in seen] == [(1, 1, 10, 3), (1, 1, 7, 3)]  # both query heads
    for _, keys, mask in seen:
        np.testing.assert_array_equal(keys[..., :5, :], case.k[..., :5, :])
        np.testing.assert_array_equal(mask[0, 0, :, 0], real[0])


def test_a_normalization_sees_pooled_keys() -> None:
    case = normal_case(spec(normalization=Smoothed(), rest="sh(2,2)"))
    pooled = np.stack([case.k[..., a : a + 2, :].mean(axis=-2) for a in range(0, 7, 2)], axis=-2)
    values = np.stack([case.v[..., a : a + 2, :].mean(axis=-2) for a in range(0, 7, 2)], axis=-2)
    plain = spec(normalization=Smoothed())
    np.testing.assert_allclose(
        pdcore.attention(*case.qkv, case.spec, **case.call),
        pdcore.attention(case.q, pooled, values, plain, **case.call),
        atol=1e-13,
    )


@pytest.mark.parametrize("rest", ["", "linear", "cosine+sh(1,2)", "h(count)"])
def test_iterative_statistics_run_in_rounds(rest: str) -> None:
    case = normal_case(spec(normalization=Centred(), rest=rest))
    real = np.random.default_rng(3).random((2, 7)) < 0.8
    case = replace(case, call={"key_mask": real})
    out, lse = pdcore.attention(*case.qkv, case.spec, return_lse=True, **case.call)
    check_forward(case, out, lse)
    with np.errstate(all="ignore"):
        check_forward(case, *run(Strict(), case, array_api_strict.asarray))
    once: Any = type("Once", (Reweighted,), {"rounds": 1})
    plan = case.plan()
    assert plan.summary is not None
    assert plan.summary.statistics == Reweighted()
    fewer = replace(plan, summary=dataclasses.replace(plan.summary, statistics=once()))
    with pytest.raises(AssertionError):
        check_forward(case, *run(Strict(), case, array_api_strict.asarray, plan=fewer))


def test_rounds_of_merged_blocks_are_rounds_of_all_keys() -> None:
    keys = np.random.default_rng(0).normal(size=(2, 9, 3)) + np.arange(3)
    stats, whole, blocks = Reweighted(), None, None
    for _ in range(stats.rounds):
        whole = stats.finalize(stats.of(keys, None, xp=np, previous=whole), xp=np)
        parts = [
            stats.of(keys[:, at], None, xp=np, previous=blocks) for at in (slice(0, 4), slice(4, 9))
        ]
        blocks = stats.finalize(stats.merge(*parts, xp=np), xp=np)
    assert whole is not None
    assert blocks is not None
    np.testing.assert_allclose(blocks["mean"], whole["mean"], rtol=1e-14)


def test_statistics_without_pullback_are_refused_for_gradients() -> None:
    case = normal_case(spec(normalization=Centred()))
    with pytest.raises(NoBackendError, match="Reweighted has no vjp"):
        pdcore.attention_vjp(*case.qkv, case.spec)


def test_a_normalization_without_pullback_is_refused_for_gradients() -> None:
    @dataclass(frozen=True)
    class Doubled(Normalization):
        word = "doubled"

        def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
            return 2.0 * x

        def latex(self) -> str:
            return "2x"

    case = normal_case(AttentionSpec(normalization=Doubled()))
    check_forward(case, *pdcore.attention(*case.qkv, case.spec, return_lse=True))
    with pytest.raises(UnsupportedError, match="doubled has no apply_vjp"):
        pdcore.attention_vjp(*case.qkv, case.spec, backend="numpy")
    assert not Doubled().has_vjp
    assert Scaled().has_vjp


def test_statistics_of_the_future_are_refused_under_causal() -> None:
    with pytest.raises(UnsupportedError, match=r"smoothed.*future leaks"):
        spec(normalization=Smoothed(), rest="causal")
    with pytest.raises(UnsupportedError, match=r"centred.*allow_leak=true"):
        spec(normalization=Centred(), rest="causal")
    assert spec(normalization=Centred(allow_leak=True), rest="causal")
    assert spec(normalization=Scaled(), rest="causal")


# --- what is built in is final --------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Exponential, Batch, Identity])
def test_classes_that_lowering_recognises_cannot_be_subclassed(cls: type) -> None:
    field = "kernel" if issubclass(cls, Kernel) else "normalization"
    own: Any = dataclass(frozen=True)(type("Mine", (cls,), {"word": "mine"}))
    with pytest.raises(TypeError, match=rf"{field}: Mine is a subclass of {cls.__name__}"):
        AttentionSpec(**{field: own()})


def test_a_feature_map_may_be_extended() -> None:
    @dataclass(frozen=True)
    class Leaky(Relu):
        word = "leaky"

        def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
            return super().features(x, xp=xp, params=params) + 0.1

    case = normal_case(AttentionSpec(Leaky()))
    check_forward(case, *pdcore.attention(*case.qkv, case.spec, return_lse=True))


# --- words ----------------------------------------------------------------------------------------


@pytest.fixture
def words() -> Iterator[None]:
    for kernel in (Sigmoid, Rational, Softplus):
        pdcore.register_kernel(kernel)
    for normalization in (Smoothed, Centred):
        pdcore.register_normalization(normalization)
    yield
    for cls in (Sigmoid, Rational, Softplus, Smoothed, Centred):
        vocabulary.unregister(cls.word)


def test_registered_words_join_the_grammar(words: None) -> None:
    got = parse("rational(1, reach=2)+smoothed(0.1)+sparse(3,3)+h(count)")
    assert got.kernel == Rational(1.0, reach=2.0)
    assert isinstance(got.kernel.width, float)
    assert got.normalization == Smoothed(0.1)
    for text in ("rational(0.5,3)", "sigmoid_+sh(1,2)", "softplus+centred(allow_leak=true)+causal"):
        assert parse(str(parse(text))) == parse(text)
    assert str(parse("rational(2)")) == "rational(width=2)"
    with pytest.raises(SpecError, match=r"'rational' and 'softmax' both set the kernel"):
        parse("rational(1)+softmax")
    with pytest.raises(SpecError, match=r"unknown word 'ratonal'; did you mean 'rational'\?"):
        parse("ratonal(1)")
    with pytest.raises(SpecError, match=r"rational: power is 2.5, expected int"):
        parse("rational(1,2.5)")
    with pytest.raises(SpecError, match=r"rational: width is 'wide', expected float"):
        parse("rational(wide)")
    with pytest.raises(SpecError, match=r"rational.*width"):
        parse("rational")
    case = normal_case("rational(1,reach=2)", n=3)
    check_forward(case, *pdcore.attention(*case.qkv, "rational(1,reach=2)", return_lse=True))


def test_words_are_gone_after_unregistering(words: None) -> None:
    vocabulary.unregister("rational")
    with pytest.raises(SpecError, match="unknown word 'rational'"):
        vocabulary_free_parse("rational(1)")


def vocabulary_free_parse(text: str) -> AttentionSpec:
    """Parse a string without the cache."""
    return parse.__wrapped__(text)


def frozen(name: str, base: type, /, **attributes: Any) -> Any:
    return dataclass(frozen=True)(type(name, (base,), attributes))


WRONG_CLASSES: dict[str, tuple[Any, str]] = {
    "no class": (Rational(1.0), "expected a subclass of pdcore.Kernel"),
    "another class": (Scaled, "expected a subclass of pdcore.Kernel"),
    "taken": (frozen("Taken", Flat, word="softmax"), "'softmax' is taken by pdcore.spec.kernels"),
    "taken alias": (frozen("Alias", Flat, word="mine", aliases=("bn",)), "'bn' is taken by"),
    "reserved": (frozen("Reserved", Flat, word="causal"), "'causal' is taken by the grammar"),
    "no identifier": (frozen("Spaced", Flat, word="my kernel"), "'my kernel', expected an ident"),
    "no word": (type("Wordless", (PointwiseKernel,), {}), "its word is ''"),
    "not frozen": (
        dataclass(type("Melted", (PointwiseKernel,), {"word": "melted"})),
        "frozen dataclass",
    ),
    "no dataclass": (type("Bare", (Kernel,), {"word": "bare"}), "frozen dataclass"),
}


@pytest.mark.parametrize("name", WRONG_CLASSES)
def test_classes_that_cannot_be_registered(name: str) -> None:
    cls, says = WRONG_CLASSES[name]
    before = set(vocabulary.kernel_words())
    with pytest.raises(PluginError) as caught:
        pdcore.register_kernel(cls)
    assert says in str(caught.value)
    assert set(vocabulary.kernel_words()) == before


def test_a_parameter_name_is_declared_once() -> None:
    @dataclass(frozen=True)
    class Sloped(Scaled):
        word = "sloped"

        def parameters(self) -> tuple[Parameter, ...]:
            return (Parameter("slope", (("H", "D"),)),)

    with pytest.raises(SpecError, match=r"sigmoid_\+sloped declare a parameter of the same"):
        AttentionSpec(Sigmoid(), normalization=Sloped())


def test_a_parameter_of_a_kernel_has_the_axis_of_the_key_heads() -> None:
    @dataclass(frozen=True)
    class Sloped(Scaled):
        word = "sloped"

        def parameters(self) -> tuple[Parameter, ...]:
            return (Parameter("slope", (("Hq", "D"),)),)

    with pytest.raises(UnsupportedError, match=r"sloped: parameter 'slope'.*'H', first"):
        AttentionSpec(normalization=Sloped())


def test_a_user_normalization_may_use_moments() -> None:
    @dataclass(frozen=True)
    class Standard(Normalization):
        word = "standard"
        eps: ClassVar[float] = 0.3

        def statistics_state(self) -> Statistics:
            return Moments()

        def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
            return (x - state["mean"]) / xp.sqrt(state["var"] + self.eps)

        def apply_vjp(
            self, x: Any, state: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
        ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
            dx = cotangent / xp.sqrt(state["var"] + self.eps)
            var = -0.5 * dx * (x - state["mean"]) / (state["var"] + self.eps)
            return dx, {"mean": -dx, "var": var}, {}

        def latex(self) -> str:
            return "T"

    case = normal_case(AttentionSpec(normalization=Standard()))
    same = replace(case, spec=parse("bn(eps=0.3)"))
    results: list[dict[str, Array]] = []
    for given in (case, same):
        out, lse, vjp = pdcore.attention_vjp(*given.qkv, given.spec)
        check_forward(given, out, lse)
        results.append({"out": out, "lse": lse, **vjp(*cotangents(given, lse))})
    for name, x in results[0].items():
        np.testing.assert_allclose(results[1][name], x, rtol=0, atol=1e-12, err_msg=name)
