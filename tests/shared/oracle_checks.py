"""The oracle on a framework: the same numbers as NumPy, and gradients that are true.

A module of tests has a fixture ``framework`` and imports these tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pdcore.reference import reference_attention, reference_weights
from pdcore.spec import AttentionSpec, FeatureMap, PointwiseKernel, as_spec, expression

B, HQ, HKV, N, M, D, DV = 2, 2, 2, 3, 5, 2, 2

#: One spec or more for each axis, and each pair of axes that share a formula.
SPECS = (
    "softmax",
    "softmax+h(count)",
    "softmax(scale=0.5,softcap=1.5)+h(one)",
    "gaussian(gamma=0.3)+bn(eps=0.1)",
    "cosine(scale=2)+h(count)",
    "cosine+bn(eps=0.1)+sh(1,2)",
    "polynomial(degree=4,coef0=0.5)",
    "polynomial(degree=2,coef0=0)+h(one)+causal",
    "linear+h(count)",
    "linear+bn(beta=param,eps=0.1)+sparse(2,1)",
    "relu",
    "relu+h(one)+sh(2,3)",
    "random_features(count=3,seed=3)",
    "random_features(count=3,scale=0.7)+h(one)+bn(eps=0.5)",
    "bn(beta=0.5,eps=0.1)",
    "bn(statistics=batch,eps=0.1)+sh(1,2)",
    "bn(statistics=running,beta=param)",
    "bn(statistics=prefix,eps=0.1)",
    "causal+bn(statistics=prefix,beta=param,eps=0.1)+sh(1,2)",
    "causal+bn(statistics=prefix,eps=0.1)+sh(2,1,pool=first)+h(count)",
    "sh(2,3,pool=first)",
    "sh(2,3)+sparse(3,inf)",
)


def arguments(text: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw the arrays that have gradients, params by their own names, and the other arguments."""
    rng = np.random.default_rng(seed)
    smooth = {
        "q": rng.normal(size=(B, HQ, N, D)),
        "k": rng.normal(size=(B, HKV, M, D)) + 0.5,
        "v": rng.normal(size=(B, HKV, M, DV)),
    }
    spec = as_spec(text)
    if spec.kernel.has_log and spec.heads.largest == 1:
        smooth["bias"] = rng.normal(size=(HQ, N, M))
        smooth["bias"][0, 0, 1] = -math.inf
    if "beta=param" in text:
        smooth["beta"] = rng.normal(size=(HKV, D) if "causal" in text else (HKV,))
    if "running" in text:
        smooth["mean"] = rng.normal(size=(HKV, D))
        smooth["var"] = rng.uniform(0.5, 2.0, size=(HKV, D))
    fixed = {
        "mask": rng.random((B, 1, N, M)) < 0.8,
        "key_mask": rng.random((B, M)) < 0.8,
        "offset": np.asarray([1, 3]),
    }
    return smooth, fixed


def call(
    text: str | AttentionSpec, smooth: Mapping[str, Any], fixed: Mapping[str, Any], **options: Any
) -> Any:
    smooth = dict(smooth)
    q, k, v = (smooth.pop(name) for name in "qkv")
    bias = smooth.pop("bias", None)
    return reference_attention(q, k, v, text, bias=bias, params=smooth, **fixed, **options)


Slopes = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Any, Any, dict[str, Any]]]


@dataclass(frozen=True)
class Framework:
    """One library, and its automatic differentiation.

    ``slopes(spec)(smooth, fixed)`` gives out, lse, and the gradient of `loss`, as NumPy arrays.
    """

    asarray: Callable[[Any], Any]
    slopes: Callable[[str | AttentionSpec], Slopes]


def loss(out: Any, lse: Any, where: Any, isfinite: Any, asarray: Any) -> Any:
    """Weigh every entry of out, and of lse where it is finite, by a number of its own."""
    rng = np.random.default_rng(1)
    of_out, of_lse = (asarray(rng.normal(size=tuple(x.shape))) for x in (out, lse))
    return (out * of_out).sum() + (where(isfinite(lse), lse, asarray(0.0)) * of_lse).sum()


def moved(framework: Framework, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: framework.asarray(x) for name, x in arrays.items()}


def agree(got: Any, expected: Any, tolerance: float) -> None:
    got = np.asarray(got)
    assert got.dtype == expected.dtype
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    scale = max(np.max(np.abs(expected), where=finite, initial=0.0), 1e-300)
    np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=tolerance * scale)


def central_difference(
    spec: str | AttentionSpec,
    smooth: Mapping[str, Any],
    fixed: Mapping[str, Any],
    name: str,
    direction: Any,
) -> float:
    """Differentiate `loss` along a direction of one argument, in longdouble."""
    wide = {name: x.astype(np.longdouble) for name, x in smooth.items()}
    step = np.longdouble(1e-7)
    ends = []
    for sign in (1, -1):
        moved = {**wide, name: wide[name] + sign * step * direction}
        out, lse = call(spec, moved, fixed, return_lse=True)
        ends.append(loss(out, lse, np.where, np.isfinite, np.asarray))
    return float((ends[0] - ends[1]) / (2 * step))


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.sampled(2)
def test_numbers_are_those_of_numpy_and_gradients_true(text: str, framework: Framework) -> None:
    smooth, fixed = arguments(text)
    out, lse, slopes = framework.slopes(text)(smooth, fixed)
    expected = call(text, smooth, fixed, return_lse=True)
    agree(out, expected[0], 1e-13)
    agree(lse, expected[1], 1e-13)
    rng = np.random.default_rng(2)
    for name, x in smooth.items():
        for _ in range(2):
            direction = np.where(np.isfinite(x), rng.normal(size=x.shape), 0.0)
            slope = central_difference(text, smooth, fixed, name, direction)
            scale = np.linalg.norm(slopes[name]) * np.linalg.norm(direction)
            assert abs(np.sum(slopes[name] * direction) - slope) < 1e-9 * max(scale, 1e-6), name


def test_plain_calls_with_grouped_heads(framework: Framework) -> None:
    smooth, fixed = arguments("linear")
    smooth["q"] = np.concat([smooth["q"], 2 * smooth["q"]], axis=1)
    given = {**smooth, **fixed, "offset": "end"}
    ours = {**moved(framework, {**smooth, **fixed}), "offset": "end"}
    for function, spec in ((reference_attention, "causal"), (reference_weights, "sh(2,2)")):
        agree(function(**ours, spec=spec), function(**given, spec=spec), 1e-13)


@pytest.mark.parametrize("shape", [(0, M), (N, 0)])
@pytest.mark.parametrize(
    "text", ["bn(statistics=prefix)+sh(1,2)", "linear+sh(1,2)+bn", "random_features(count=3)"]
)
def test_empty(text: str, shape: tuple[int, int], framework: Framework) -> None:
    smooth, _ = arguments("linear")
    smooth = {
        "q": smooth["q"][:, :, : shape[0]],
        "k": smooth["k"][:, :, : shape[1]],
        "v": smooth["v"][:, :, : shape[1]],
    }
    out, lse, slopes = framework.slopes(text)(smooth, {})
    assert out.shape == (B, HQ, shape[0], DV)
    if not shape[1]:
        assert not out.any()
        assert (lse == -math.inf).all()
    assert all(not x.any() for x in slopes.values())


# --- gradients where a formula has none -----------------------------------------------------------


@dataclass(frozen=True)
class Square(PointwiseKernel):
    """s^2 by its logarithm, which has no slope at 0."""

    word = "square"

    def log_kappa(
        self, s: expression.Expression, dim: int, **params: expression.Expression
    ) -> expression.Expression:
        return 2.0 * expression.log(abs(s))

    def latex(self) -> str:
        return "s^2"


@pytest.mark.parametrize("h", ["sum", "count", "one"])
@pytest.mark.parametrize("kernel", ["relu", "polynomial(coef0=0)", "cosine", "square"])
@pytest.mark.sampled(2)
def test_where_kappa_or_its_logarithm_bends(kernel: str, h: str, framework: Framework) -> None:
    spec: str | AttentionSpec = f"{kernel}+h({h})"
    if kernel == "square":
        spec = AttentionSpec(Square(), h)
    smooth, _ = arguments("linear")
    smooth["q"][0, 0, 0] = 0.0  # a row of zeros: for all but cosine, every kappa is 0
    smooth["q"][0, 1, 1] = [1.0, 0.0]
    smooth["k"][0, 0, 2] = 0.0
    smooth["k"][0, 1, 3] = [0.0, 1.0]  # orthogonal to that query
    _, _, slopes = framework.slopes(spec)(smooth, {})
    for name, x in slopes.items():
        assert np.isfinite(x).all(), name
    assert not slopes["q"][0, 0, 0].any()
    assert not slopes["k"][0, 0, 2].any()
    # Along the other keys the loss is smooth, unless they are at the bend of relu.
    direction = np.random.default_rng(3).normal(size=smooth["k"].shape)
    direction[0, 0, 2] = 0.0
    if kernel == "relu":
        direction[0, 1, 3] = 0.0
    slope = central_difference(spec, smooth, {}, "k", direction)
    assert abs(np.sum(slopes["k"] * direction) - slope) < 1e-8 * np.linalg.norm(slopes["k"])


@dataclass(frozen=True)
class Linear(FeatureMap):
    """kappa = x.y, for inputs that make it positive."""

    word = "linear_features"

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x

    def latex(self) -> str:
        return "x y"


def test_a_row_whose_kernel_values_are_all_zero_has_zero_gradient(framework: Framework) -> None:
    smooth = {name: np.abs(x) for name, x in arguments("linear")[0].items()}
    smooth["q"][0, 0, 1] = 0.0
    out, lse, slopes = framework.slopes(AttentionSpec(Linear()))(smooth, {})
    assert not out[0, 0, 1].any()
    assert lse[0, 0, 1] == -math.inf
    assert not slopes["q"][0, 0, 1].any()
    assert slopes["q"][0, 0, 0].any()


@pytest.mark.parametrize("kernel", ["softmax", "linear", "cosine", "polynomial", "relu"])
def test_large_inputs_have_finite_gradients(kernel: str, framework: Framework) -> None:
    smooth = {name: 1e3 * np.abs(x) for name, x in arguments("linear")[0].items()}
    _, _, slopes = framework.slopes(kernel)(smooth, {})
    assert all(np.isfinite(x).all() for x in slopes.values())


MASKED = (
    "softmax",
    "gaussian(gamma=1)+bn",
    "cosine+h(count)",
    "polynomial(coef0=0)+h(one)",
    "linear+bn(statistics=batch)",
    "relu",
    "random_features(count=3)+h(count)",
    "bn(statistics=prefix)+sh(1,2)",
    "causal+bn(statistics=prefix)",
    "sh(2,3,pool=first)+bn",
)


@pytest.mark.parametrize("text", MASKED)
def test_empty_rows_have_zero_gradient_and_padding_has_none(
    text: str, framework: Framework
) -> None:
    smooth, _ = arguments("linear")
    function = framework.slopes(text)
    # Sequence 0 has no real key; in sequence 1 the mask empties row 1.
    mask = np.ones((B, 1, N, M), dtype=bool)
    mask[1, :, 1] = False
    real = np.asarray([[False] * M, [False] + [True] * (M - 1)])
    out, lse, slopes = function(smooth, {"mask": mask, "key_mask": real})
    assert not out[0].any()
    assert not out[1, :, 1].any()
    assert (lse[0] == -math.inf).all()
    assert (lse[1, :, 1] == -math.inf).all()
    assert not slopes["q"][1, :, 1].any()
    assert slopes["v"][1].any()
    for name, x in slopes.items():
        assert np.isfinite(x).all(), name
        assert not x[0].any(), name
    for poison in (math.nan, math.inf):
        padding = ~real[:, None, :, None]
        dirty = {
            name: x if name == "q" else np.where(padding, poison, x) for name, x in smooth.items()
        }
        for name, x in function(dirty, {"mask": mask, "key_mask": real})[2].items():
            np.testing.assert_array_equal(x, slopes[name])
    # No key at all for anyone: variances of nothing.
    _, _, slopes = function(smooth, {"mask": mask, "key_mask": np.zeros((B, M), dtype=bool)})
    assert all(not x.any() for x in slopes.values())


@pytest.mark.parametrize("text", ["gaussian(gamma=1)+bn", "causal+bn(statistics=prefix)"])
def test_a_constant_feature(text: str, framework: Framework) -> None:
    smooth, _ = arguments("linear")
    smooth["k"][..., 1] = 7.0
    _, _, slopes = framework.slopes(text)(smooth, {})
    assert all(np.isfinite(x).all() for x in slopes.values())
