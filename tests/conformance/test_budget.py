"""The error budget: correct computations stay within it, planted defects exceed it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pdcore_conformance.judge.budget import FACTORS, expect, judge, judge_array, worst

Array = np.ndarray[Any, Any]
QUERIES, KEYS, DIM = 32, 4096, 64


def draw(dtype: Any = np.float32, seed: int = 0) -> tuple[Array, Array, Array]:
    """Draw queries, keys and values of two heads, with many keys, which hide small defects."""
    rng = np.random.default_rng(seed)
    return tuple(
        rng.standard_normal((1, 2, rows, DIM)).astype(dtype) for rows in (QUERIES, KEYS, KEYS)
    )  # type: ignore[return-value]


def blocked(
    q: Array, k: Array, v: Array, *, scale: float = DIM**-0.5, block: int = 512
) -> tuple[Array, Array]:
    """Compute softmax attention as a correct kernel does: in float32, over blocks of keys."""
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    level = np.full(q.shape[:-1], -np.inf, np.float32)
    total = np.zeros(q.shape[:-1], np.float32)
    out = np.zeros((*q.shape[:-1], v.shape[-1]), np.float32)
    for start in range(0, k.shape[-2], block):
        part = slice(start, start + block)
        s = np.float32(scale) * (q @ k[..., part, :].swapaxes(-1, -2))
        new_level = np.maximum(level, s.max(axis=-1))
        p, decay = np.exp(s - new_level[..., None]), np.exp(level - new_level)
        total = total * decay + p.sum(axis=-1)
        out = out * decay[..., None] + p @ v[..., part, :]
        level = new_level
    return out / total[..., None], level + np.log(total)


def normalized(q: Array, k: Array, *, ddof: int = 0, eps: float = 1e-5) -> tuple[Array, Array]:
    """Return T(q) and T(k) of Attention-BN in float32."""
    mean = k.mean(axis=-2, keepdims=True)
    var = k.var(axis=-2, keepdims=True, ddof=ddof)
    return (q - mean) / np.sqrt(var + eps), (k - mean) / np.sqrt(var + eps)


def truncated(x: Array) -> Array:
    """Return the numbers with the 10 bits of mantissa that TF32 keeps."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def outputs(result: tuple[Array, Array], dtype: Any = np.float32) -> dict[str, Array]:
    return {"out": result[0].astype(dtype), "lse": result[1]}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("block", [KEYS, 512, 100])
def test_correct_kernels_stay_within_the_budget(dtype: Any, block: int) -> None:
    q, k, v = draw(dtype)
    verdicts = judge(outputs(blocked(q, k, v, block=block), dtype), expect(q, k, v))
    assert worst(verdicts) < 0.6, verdicts


def test_correct_batch_normalization_stays_within_the_budget() -> None:
    q, k, v = draw()
    verdicts = judge(outputs(blocked(*normalized(q, k), v)), expect(q, k, v, "bn"))
    assert worst(verdicts) < 0.6, verdicts


def test_float64_is_judged_by_longdouble() -> None:
    q, k, v = draw(np.float64)
    expected = expect(q, k, v)
    assert expected.oracle["out"].dtype == np.longdouble
    s = (q @ k.swapaxes(-1, -2)) * DIM**-0.5
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    out = p @ v / p.sum(axis=-1, keepdims=True)
    assert judge({"out": out}, expected)["out"].ratio < 0.6
    single = blocked(q, k, v)[0].astype(np.float64)
    assert judge({"out": single}, expected)["out"].ratio > 1e6


Kernel = Callable[[Array, Array, Array], tuple[Array, Array]]
DEFECTS: dict[str, tuple[str, Kernel]] = {
    "scale 1 % off": ("softmax", lambda q, k, v: blocked(q, k, v, scale=1.01 * DIM**-0.5)),
    "last key dropped": ("softmax", lambda q, k, v: blocked(q, k[..., :-1, :], v[..., :-1, :])),
    "TF32 inputs": ("softmax", lambda q, k, v: blocked(truncated(q), truncated(k), truncated(v))),
    "ddof = 1": ("bn", lambda q, k, v: blocked(*normalized(q, k, ddof=1), v)),
    "eps = 1e-3": ("bn", lambda q, k, v: blocked(*normalized(q, k, eps=1e-3), v)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_exceed_the_budget_in_both_outputs(defect: str) -> None:
    spec, kernel = DEFECTS[defect]
    q, k, v = draw()
    verdicts = judge(outputs(kernel(q, k, v)), expect(q, k, v, spec))
    for name, verdict in verdicts.items():
        assert verdict.ratio > 10, (name, verdict)
        assert not verdict.ok


@pytest.mark.parametrize("defect", ["scale 1 % off", "last key dropped"])
def test_a_fixed_tolerance_would_miss_them(defect: str) -> None:
    _, kernel = DEFECTS[defect]
    q, k, v = draw()
    assert np.max(abs(kernel(q, k, v)[0] - blocked(q, k, v)[0])) < 1e-2


def test_one_wrong_head_is_named() -> None:
    q, k, v = draw()
    expected = expect(q, k, v)
    out = expected.low["out"].copy()
    out[0, 1] *= np.float32(1.001)
    verdict = judge({"out": out}, expected)["out"]
    assert verdict.head == (0, 1)
    assert verdict.ratio > 1
    assert "at (0, 1)" in str(verdict)


@pytest.mark.parametrize("planted", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_an_infinite_error(planted: float) -> None:
    q, k, v = draw()
    expected = expect(q, k, v)
    out = expected.low["out"].copy()
    out[0, 1, 3, 5] = planted
    assert judge({"out": out}, expected)["out"].ratio == math.inf


@pytest.mark.parametrize(
    ("spec", "lse"),
    [
        ("softmax", "float32"),
        ("gaussian(gamma=0.1)", "float32"),
        ("sh(1,1)", "float32"),
        ("cosine", "float16"),
        ("bn", "float16"),
        ("sh(1,2)", "float16"),
    ],
)
def test_lse_of_16_bit_inputs_is_float32_unless_rows_are_rounded(spec: str, lse: str) -> None:
    q, k, v = (x[..., :8, :4] for x in draw(np.float16))
    assert expect(q, k, v, spec).lse_dtype == lse
    assert expect(*(x.astype(np.float64) for x in (q, k, v)), spec).lse_dtype == "float64"


def test_minus_infinity_of_an_empty_row_must_be_there() -> None:
    q, k, v = draw()
    mask = np.ones((QUERIES, KEYS), dtype=bool)
    mask[7] = False
    expected = expect(q, k, v, mask=mask)
    assert judge(expected.low, expected)["lse"].ok
    lse = expected.low["lse"].copy()
    lse[0, 0, 7] = -1e30
    assert judge({"lse": lse}, expected)["lse"].ratio == math.inf
    out = expected.low["out"].copy()
    out[0, 0, 7, 0] = 1e-3
    assert not judge({"out": out}, expected)["out"].ok


def test_a_nan_of_the_oracle_must_be_there_and_leaves_the_budget() -> None:
    q, k, v = draw()
    q[0, 0, 3] = np.nan
    expected = expect(q, k, v)
    good = judge(expected.low, expected)
    assert good["out"].ok
    assert math.isfinite(good["out"].budget)
    out = expected.low["out"].copy()
    out[0, 0, 3] = 0.0
    assert judge({"out": out}, expected)["out"].ratio == math.inf


def test_zero_budget_allows_only_zero_error() -> None:
    zero = np.zeros((1, 2, 4, 3), np.float32)
    wide = zero.astype(np.float64)
    assert judge_array(zero, wide, zero, dtype="float32").ratio == 0.0
    bad = zero.copy()
    bad[0, 1, 0, 0] = 1e-30
    assert judge_array(bad, wide, zero, dtype="float32").ratio == math.inf


def test_other_dtypes_and_shapes_are_errors_not_rounding() -> None:
    q, k, v = draw()
    expected = expect(q, k, v)
    out = expected.low["out"]
    with pytest.raises(TypeError, match="out: got dtype float64, expected float32"):
        judge({"out": out.astype(np.float64)}, expected)
    with pytest.raises(ValueError, match=r"out: got shape \(1, 2, 31, 64\)"):
        judge({"out": out[..., :-1, :]}, expected)


def test_empty_outputs_have_no_error() -> None:
    q, k, v = (x[..., :0, :] for x in draw())
    expected = expect(q, k, v)
    assert worst(judge(expected.low, expected)) == 0.0


def test_params_bias_and_masks_reach_the_reference() -> None:
    q, k, v = (x[..., :16, :] for x in draw())
    rng = np.random.default_rng(1)
    call = {
        "bias": rng.standard_normal((16, 16)).astype(np.float32),
        "key_mask": np.arange(16)[None] < 12,
        "offset": "end",
        "params": {"beta": np.array([0.5, 0.9], np.float32)},
    }
    expected = expect(q, k, v, "bn(beta=param)+sparse(4,inf)", **call)
    assert expected.oracle["out"].dtype == np.float64
    assert judge(expected.low, expected)["out"].ok
    other = expect(q, k, v, "bn(beta=param)+sparse(4,inf)", **{**call, "offset": 0})
    assert not judge(other.low, expected)["out"].ok


def test_factors_are_the_documented_ones() -> None:
    assert FACTORS == {"float16": 2, "bfloat16": 2, "float32": 10, "float64": 10}
