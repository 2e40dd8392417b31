"""Rounding: every dtype over tile edges, and the cases that are hard in few bits."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference_cases import (
    INF,
    Array,
    Case,
    PlainNumpy,
    check_budget,
    check_forward,
    check_gradients,
    cotangents,
    normal_case,
    run,
)

import pdcore

DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}


def attend(case: Case) -> tuple[Array, Array]:
    out, lse = pdcore.attention(*case.qkv, case.spec, return_lse=True, **case.call)
    return out, lse


def check(case: Case) -> None:
    """Hold the NumPy backend against the oracle: at 1e-12 in float64, else by the budget."""
    out, lse = attend(case)
    assert out.dtype == case.q.dtype
    assert lse.dtype == (np.float64 if case.q.dtype == np.float64 else np.float32)
    if case.q.dtype == np.float64:
        check_forward(case, out, lse)
    else:
        check_budget(case, out, lse)


# --- over the edges of tiles ----------------------------------------------------------------------

#: One of them in every tile size that a blocked backend is likely to have, one just beside it.
SIZES = [(63, 64), (64, 65), (65, 63), (128, 200), (200, 128), (513, 512), (1, 513), (513, 1)]
TILED = [
    "softmax",
    "causal",
    "bn",
    "bn+sh(1,2)",
    "linear",
    "linear+causal",
    "gaussian(gamma=0.1)+h(count)",
    "sparse(70,3)",
    "causal+bn(statistics=prefix,eps=0.1)",
    "random_features(8,1)+causal",
    "polynomial(degree=2)+sh(2,3)+causal",
    "cosine(scale=4)+sparse(inf,64)",
    "linear+sparse(20,20)",
    "relu+causal+sh(2,3)+h(count)",
    "bn(statistics=batch,beta=0.5)+h(count)",
]


def dressed(case: Case, kind: int, dtype: Any) -> Case:
    """Give the call masks, an offset or a bias, in turn."""
    rng = np.random.default_rng(kind)
    (*lead, heads, n, _), m = case.q.shape, case.k.shape[-2]
    call = dict(case.call)
    if kind % 4 == 1:
        call["key_mask"] = rng.random((*lead, m)) < 0.9
    elif kind % 4 == 2:
        call["offset"] = rng.integers(-10, 30, size=lead)
        call["mask"] = rng.random((1, heads, n, m)) < 0.9
    elif kind % 4 == 3:
        call["offset"] = "end"
        if case.spec.kernel.has_log and case.spec.heads.largest == 1:
            bias = rng.normal(size=(heads, n, m)).astype(np.float32)
            call["bias"] = bias if dtype != np.float64 else bias.astype(dtype)
    return replace(case, call=call)


#: Every spec in every dtype at four of the sizes, so that every spec meets every size.
TURNS = [
    (dtype, SIZES[(2 * i + j + step) % len(SIZES)], text, step // 2 + j)
    for (i, dtype), (j, text), step in itertools.product(
        enumerate(DTYPES), enumerate(TILED), range(0, 8, 2)
    )
]


@pytest.mark.parametrize(
    ("dtype", "size", "text", "kind"),
    [pytest.param(*t, id=f"{t[0]}-{t[1][0]}x{t[1][1]}-{t[2]}-{t[3] % 4}") for t in TURNS],
)
@pytest.mark.sampled(3)
def test_tile_edges(dtype: str, size: tuple[int, int], text: str, kind: int) -> None:
    n, m = size
    d = 4 if "prefix" in text else 16
    case = normal_case(text, seed=kind, lead=(1,), n=n, m=m, d=d, dv=5, dtype=DTYPES[dtype])
    check(dressed(case, kind, DTYPES[dtype]))


@pytest.mark.parametrize("text", TILED)
@pytest.mark.parametrize("size", [(65, 130), (200, 63)])
@pytest.mark.sampled(3)
def test_gradients_over_tile_edges(text: str, size: tuple[int, int]) -> None:
    n, m = size
    case = normal_case(text, lead=(2,), heads=3 if "sh(" not in text else 2, n=n, m=m, d=8, dv=5)
    for kind in range(4):
        call = dressed(case, kind, np.float64)
        _, lse, vjp = pdcore.attention_vjp(*call.qkv, call.spec, **call.call)
        d_out, d_lse = cotangents(call, lse)
        got = vjp(d_out, d_lse)
        # The generic contraction, in blocks that share no edge with those of a fast one.
        with np.errstate(all="ignore"):
            want = PlainNumpy().attention_vjp(call.plan(), call.inputs())[2](d_out, d_lse)
        assert got.keys() == want.keys() >= {"q", "k", "v"}
        for name, x in want.items():
            size_ = np.max(np.abs(x), initial=1e-3)
            np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-11 * size_, err_msg=name)


class Wide(PlainNumpy):
    query_block = 37
    key_block = 41


@pytest.mark.parametrize("text", TILED)
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != "float64"])
def test_gradients_in_few_bits(dtype: str, text: str) -> None:
    case = normal_case(text, lead=(2,), n=66, m=67, d=8, dv=5, dtype=DTYPES[dtype])
    wide = case.cast(np.float64)
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    d_out, d_lse = cotangents(wide, lse)
    got = vjp(d_out.astype(out.dtype), d_lse.astype(lse.dtype))
    rounded = [x.astype(np.float64) for x in (d_out.astype(out.dtype), d_lse.astype(lse.dtype))]
    with np.errstate(all="ignore"):
        want = Wide().attention_vjp(wide.plan(), wide.inputs())[2](*rounded)
    bound = {"float16": 3e-3, "bfloat16": 3e-2, "float32": 3e-5}[dtype]
    for name, x in want.items():
        assert got[name].dtype == case.q.dtype, name
        size = np.max(np.abs(x))
        error = np.max(np.abs(got[name].astype(np.float64) - x))
        assert error <= bound * size, f"{name}: {error / size:.3g}"


@pytest.mark.parametrize(
    "text", ["softmax", "causal", "bn", "linear+causal", "causal+bn(statistics=prefix,eps=0.1)"]
)
def test_one_gradient_over_tile_edges_against_differences(text: str) -> None:
    case = normal_case(text, lead=(1,), heads=1, group=1, n=70, m=135, d=2, dv=1)
    _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    d_out, d_lse = cotangents(case, lse)
    assert check_gradients(case, vjp(d_out, d_lse), d_out, d_lse)


# --- hard in 16 bit -------------------------------------------------------------------------------

NORMALIZED = [
    "bn",
    "bn(beta=0.5)",
    "bn(statistics=batch)",
    "causal+bn(statistics=prefix)",
    "bn+sh(1,2)",
    "linear+bn",
]
LOW = ["float16", "bfloat16", "float32"]


@pytest.mark.parametrize("value", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("text", NORMALIZED)
def test_a_constant_feature(text: str, dtype: str, value: float) -> None:
    case = normal_case(text, n=40, m=40, d=8, dtype=DTYPES[dtype])
    case.k[..., 2] = value
    case.q[..., 2] = value
    out, lse = attend(case)
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.isfinite(lse[..., 1:]).all()
    check(case)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "text", [*NORMALIZED, "softmax", "linear+causal", "sh(1,2)", "gaussian(gamma=0.3)+h(count)"]
)
def test_one_or_two_keys(text: str, dtype: str, n: int) -> None:
    case = normal_case(text, n=n, m=n, d=8, dtype=DTYPES[dtype])
    out, _ = attend(case)
    assert np.isfinite(out.astype(np.float32)).all()
    check(case)
    wide = case.cast(np.float64)
    found = []
    for given in (case, wide):
        out, lse, vjp = pdcore.attention_vjp(*given.qkv, given.spec, **given.call)
        found.append(vjp(np.ones_like(out), np.where(lse > -INF, 1, 0).astype(lse.dtype)))
    for name, x in found[0].items():
        # Of one key the slope may be 1 / sqrt(eps), beyond float16; it is never NaN.
        fits = np.abs(found[1][name]) < 6e4
        assert np.isfinite(x.astype(np.float64)[fits]).all(), name
        assert not np.isnan(x.astype(np.float64)).any(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_causal_row_is_the_first_value(dtype: str) -> None:
    case = normal_case("causal+bn(statistics=prefix)", n=9, m=9, d=8, dtype=DTYPES[dtype])
    out, _ = attend(case)
    # Of one key the variance is 0, q' is the largest that it can be, and the weight is 1.
    np.testing.assert_array_equal(out[..., 0, :], np.repeat(case.v, 2, axis=1)[..., 0, :])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "text",
    [
        *NORMALIZED,
        "gaussian(gamma=5)",
        "gaussian(gamma=0.5)+bn",
        "gaussian(gamma=5)+sh(1,2)",
        "causal+bn(statistics=prefix)+sh(2,3)",
    ],
)
def test_offset_keys(text: str, dtype: str) -> None:
    case = normal_case(text, n=40, m=300, d=8, mean=100.0, sd=0.1, dtype=DTYPES[dtype])
    out, _ = attend(case)
    assert np.isfinite(out).all()
    if dtype == "float32":
        check(case)
    else:
        check_forward(case, *attend(case), tolerance=1e-9)  # 100 / 0.1 costs three digits twice


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("text", [*NORMALIZED, "gaussian(gamma=0.5)", "softmax(scale=0.01)"])
def test_an_outlying_first_key(text: str, dtype: str) -> None:
    case = normal_case(text, n=40, m=40, d=8, dtype=DTYPES[dtype])
    case.k[..., 0, :] = 1000.0
    check(case)


@pytest.mark.parametrize("dtype", LOW)
def test_an_outlier_in_padding(dtype: str) -> None:
    for text in (*NORMALIZED, "gaussian(gamma=0.5)"):
        case = normal_case(text, n=40, m=40, d=8, dtype=DTYPES[dtype])
        case.k[..., 0, :] = 1000.0
        real = np.ones((2, 40), dtype=bool)
        real[:, 0] = False
        check(replace(case, call={"key_mask": real, **case.call}))


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0, 1000.0])
def test_the_shift_of_the_gaussian_kernel(mean: float) -> None:
    case = normal_case("gaussian(gamma=0.5)", n=40, m=300, d=8, mean=mean, dtype=np.float32)
    out, _ = attend(case)
    want, _ = case.cast(np.float64).reference()
    assert np.max(np.abs(out - want)) < 5e-6  # what float32 inputs lose is in both
    check(case)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "text",
    [
        "softmax(scale=30)",
        "cosine(scale=60)",
        "gaussian(gamma=10)",
        "polynomial(degree=16)",
        "random_features(16,1,scale=8)",
        "causal+softmax(scale=30)",
    ],
)
def test_logarithms_far_beyond_the_range_of_exp(text: str, dtype: str) -> None:
    case = normal_case(text, n=70, m=70, d=8, dtype=DTYPES[dtype])
    out, lse = attend(case)
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.isfinite(lse).all()
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_features_far_below_the_range_of_exp_under_causal(dtype: str) -> None:
    mean = 30.0 if dtype == "float64" else 10.0
    # 70 rows: the first chunk has no maximum of earlier keys.
    case = normal_case(
        "random_features(16,1)+causal", n=70, m=70, d=8, mean=mean, sd=0.1, dtype=DTYPES[dtype]
    )
    assert (case.reference()[1] < (-800.0 if dtype == "float64" else -100.0)).all()
    check(case)


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_a_bias_far_beyond_the_range_of_exp(shift: float) -> None:
    case = normal_case("softmax", n=70, m=70, d=8, dtype=np.float32)
    out, lse = attend(replace(case, call={"bias": np.full((1, 1), shift, np.float32)}))
    plain, level = attend(case)
    np.testing.assert_allclose(out, plain, rtol=0, atol=0.02)  # 3e4 has two decimals left
    np.testing.assert_allclose(lse, level + shift, rtol=1e-6)


# --- repeatable -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TILED)
def test_the_same_call_gives_the_same_bits(text: str) -> None:
    case = normal_case(text, lead=(2,), n=130, m=131, d=16, dtype=np.float32)
    first, second = attend(case), attend(case)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    gradients = []
    for _ in range(2):
        _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
        d_out, d_lse = (x.astype(np.float32) for x in cotangents(case, lse))
        gradients.append(vjp(d_out, d_lse))
    for name, x in gradients[0].items():
        np.testing.assert_array_equal(x, gradients[1][name], err_msg=name)


def test_calls_from_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    given = [
        normal_case(text, seed=seed, n=100, m=90, d=8, dtype=np.float32)
        for seed, text in enumerate(TILED * 3)
    ]
    want = [attend(case) for case in given]
    with ThreadPoolExecutor(4) as pool:
        for (out, lse), (x, y) in zip(pool.map(attend, given), want, strict=True):
            np.testing.assert_array_equal(out, x)
            np.testing.assert_array_equal(lse, y)


def test_generic_blocks_and_the_fast_path_agree() -> None:
    for text in TILED:
        case = normal_case(text, n=70, m=150, d=8)
        with np.errstate(all="ignore"):
            out, lse = run(Wide(), case)
        check_forward(case, out, lse)
