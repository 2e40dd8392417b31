"""The CuPy backend's kernels of statistics and pooling, on the emulator, against float64.

As in `test_cupy_kernels`, each call is there for a way through the kernels.
"""

from __future__ import annotations

from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from emulated_checks import (
    DTYPES,
    check,
    fused,
    random_mask,
    same_bits,
    sanitized,
)
from emulated_cupy import NAME, EmulatedBackend, register
from reference_cases import normal_case

import pdcore
from pdcore.backend import Request
from pdcore.lowering import Summary
from pdcore.plugins import registry as plugins
from pdcore.spec import Moments, heads
from pdcore_backends.cupy.columns import limit
from pdcore_backends.cupy.statistics import KERNELS, summarised
from pdcore_conformance.judge.calls import dtype_of

# A program is compiled for each combination, which takes seconds.
pytestmark = pytest.mark.sampled(6)


@pytest.fixture(scope="module")
def backend() -> EmulatedBackend:
    """Return one backend for all tests, because it caches compiled kernels."""
    return EmulatedBackend()


def normal(*shape: int, mean: float = 0.0) -> Any:
    return np.random.default_rng(8).standard_normal(shape) + mean


def launched(backend: EmulatedBackend) -> set[str]:
    """Return the kernels launched since the last call, except those of scores."""
    names = {name.partition("<")[0] for name in backend.runtime.launches}
    backend.runtime.launches.clear()
    return {name for name in names if not name.startswith("scores_")}


# --- calls ----------------------------------------------------------------------------------------

MOMENTS = {"moments_of_chunks", "moments_merged", "moments_vjp"}
PREFIXES = {
    "moments_of_chunks",
    "chunks_scanned",
    "prefixes",
    "levels_of_chunks",
    "suffixes",
    "prefixes_vjp",
}
POOLS = {"pooled", "pooled_vjp"}

CALLS = {
    "of each sequence, padding": (
        "bn",
        {"n": 5, "m": 70, "d": 9, "key_mask": random_mask(2, 70)},
        MOMENTS,
    ),
    "of all sequences, padding": (
        "bn(statistics=batch)",
        {"n": 5, "m": 70, "lead": (2, 2), "key_mask": random_mask(2, 2, 70)},
        MOMENTS,
    ),
    "by another normalization": ("iebn", {"n": 5, "m": 20}, MOMENTS),
    "a sequence without a real key": (
        "bn",
        {"m": 7, "key_mask": np.asarray([[True] * 7, [False] * 7])},
        MOMENTS,
    ),
    "of no keys": ("bn(statistics=batch)", {"m": 0}, {"moments_merged"}),
    "of prefixes, padding, an offset each": (
        "causal+bn(statistics=prefix)",
        {"n": 9, "m": 70, "offset": np.asarray([50, -3]), "key_mask": random_mask(2, 70)},
        PREFIXES,
    ),
    "of prefixes, from the end": (
        "causal+bn(statistics=prefix)",
        {"n": 70, "m": 70, "d": 33, "offset": "end"},
        PREFIXES,
    ),
    "of no prefix": ("causal+bn(statistics=prefix)", {"n": 3, "m": 0}, PREFIXES),
    "of prefixes of no rows": ("causal+bn(statistics=prefix)", {"n": 0, "m": 3}, PREFIXES),
    "pooled": (
        "sh(3,1)+bn",
        {"n": 5, "m": 70, "key_mask": random_mask(2, 70, share=0.4)},
        MOMENTS | POOLS,
    ),
    "pooled, long windows": ("sh(50,1)", {"n": 5, "m": 83, "d": 9, "dv": 5}, POOLS),
    "pooled, the first key": (
        "sh(1,4,pool=first)",
        {"n": 5, "m": 11, "key_mask": random_mask(2, 11)},
        POOLS,
    ),
    "pooled prefixes": (
        "causal+sh(2,1)+bn(statistics=prefix)",
        {"n": 20, "m": 33},
        PREFIXES | POOLS,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "call", "kernels"), CALLS.values(), ids=CALLS)
def test_forward_and_gradients(
    backend: Any, spec: str, call: dict, kernels: set[str], dtype: str
) -> None:
    launched(backend)
    results = check(backend, normal_case(spec, dtype=np.dtype(dtype), **call))
    assert launched(backend) == kernels
    assert results["d_k"].dtype == dtype


@pytest.mark.parametrize(
    ("spec", "kernels"),
    [
        ("bn", {"moments_of_chunks", "moments_vjp"}),
        ("sh(3,1)", {"pooled"}),
        ("causal+bn(statistics=prefix)", {"moments_of_chunks", "prefixes", "prefixes_vjp"}),
    ],
)
def test_keys_of_16_bits_are_read_as_they_are(backend: Any, spec: str, kernels: set[str]) -> None:
    backend.runtime.launches.clear()
    check(backend, normal_case(spec, dtype=np.float16, n=5, m=20))
    own = {name for name in backend.runtime.launches if not name.startswith("scores_")}
    assert {name for name in own if "ptx::" in name} == {f"{name}<ptx::f16>" for name in kernels}


# --- states ---------------------------------------------------------------------------------------


def moments(keys: Any, real: Any, axes: tuple[int, ...]) -> dict[str, Any]:
    """Compute moments by their definition, in longdouble."""
    keys = keys.astype(np.longdouble)
    n = real.sum(axes, keepdims=True).astype(np.longdouble)
    mean = np.where(real, keys, 0).sum(axes, keepdims=True) / n
    return {
        "n": n,
        "mean": mean,
        "var": np.where(real, (keys - mean) ** 2, 0).sum(axes, keepdims=True) / n,
    }


def assert_close(state: Any, expected: Any, dtype: str) -> None:
    """Assert that a mean is right to rounding, and a variance relative to itself."""
    eps = np.finfo(dtype).eps
    spread = float(np.sqrt(expected["var"]).max())
    size = float(np.abs(expected["mean"]).max())
    np.testing.assert_array_equal(state["n"], expected["n"])
    near = eps * (size / 2 + 20 * spread)
    np.testing.assert_allclose(state["mean"], expected["mean"], rtol=0, atol=near)
    np.testing.assert_allclose(state["var"], expected["var"], rtol=0, atol=20 * eps * spread**2)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_moments_of_keys_far_from_0(backend: Any, dtype: str, scope: str) -> None:
    # Two full chunks and a partial one, and columns that do and do not fill a vector.
    keys = normal(2, 2, 1100, 6, mean=1000.0).astype(dtype_of(dtype))
    real = random_mask(2, 1, 1100, 1)
    keys[~np.broadcast_to(real, keys.shape)] = np.nan
    state = backend.statistics(Summary(Moments(), scope, KERNELS), keys, real)
    sums = "float64" if dtype == "float64" else "float32"
    assert state["var"].dtype == sums
    axes = (0, 2) if scope == "batch" else (2,)
    shown = np.broadcast_to(real, (2, 2, 1100, 1))
    assert_close(state, moments(np.asarray(keys, np.longdouble), shown, axes), sums)


def test_a_constant_feature_has_no_variance(backend: Any) -> None:
    # The mean of 7 keys is rounded by up to one unit of 1000, whose square is 4e-9.
    values = (1000 + np.arange(40) / 7).astype("float32")
    keys = np.broadcast_to(values, (1, 1, 7, 40))
    state = backend.statistics(Summary(Moments(), "sequence", KERNELS), keys, None)
    np.testing.assert_array_equal(state["mean"], values[None, None, None])
    assert state["var"].max() < 1e-14


def test_squares_do_not_overflow(backend: Any) -> None:
    keys = np.full((1, 1, 20, 4), 2.0**84, "float32")
    state = backend.statistics(Summary(Moments(), "sequence", KERNELS), keys, None)
    np.testing.assert_array_equal(state["mean"], keys[:, :, :1])
    np.testing.assert_array_equal(state["var"], 0)


@pytest.mark.parametrize("scope", ["sequence", "prefix"])
def test_a_variance_beyond_its_range_is_nan(backend: Any, scope: str) -> None:
    keys = 1e25 * normal(1, 2, 40, 8).astype("float32")
    final = backend.statistics(Summary(Moments(), scope, KERNELS), keys, None)
    assert np.isnan(final["var"][..., -1, :]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_of_many_prefixes(backend: Any, dtype: str) -> None:
    # In float64 more chunks than a scan reads at a time, and columns of two blocks.
    wide = dtype == "float64"
    count, tile = (64 * 64 + 50, 64) if wide else (300, 256)
    keys = normal(1, 1, count, 66 if wide else 7, mean=1000.0).astype(dtype)
    real = random_mask(1, 1, count, 1)
    state = backend.statistics(Summary(Moments(), "prefix", KERNELS), keys, real)
    for end in (9, tile, tile + 1, count):
        rows = {n: x[..., end : end + 1, :] for n, x in state.items()}
        assert_close(rows, moments(keys[..., :end, :], real[..., :end, :], (2,)), dtype)


def test_later_keys_change_nothing_of_a_prefix(backend: Any) -> None:
    keys = normal(1, 1, 300, 5).astype("float32")
    summary = Summary(Moments(), "prefix", KERNELS)
    whole = backend.statistics(summary, keys, None)
    keys[..., 200:, :] = np.nan
    for cut in (keys, keys[..., :201, :]):
        part = backend.statistics(summary, cut, None)
        for name, value in part.items():
            np.testing.assert_array_equal(value[..., :201, :], whole[name][..., :201, :])


@pytest.mark.parametrize("kind", ["mean", "first"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pooling_and_its_pullback(backend: Any, dtype: str, kind: str) -> None:
    real = random_mask(2, 1, 100, share=0.5)
    x = normal(2, 3, 100, 7).astype(dtype)
    x[~np.broadcast_to(real[..., None], x.shape)] = np.nan
    like = np.empty(0, "float64")
    expected_weights = heads.pooling_weights(100, real, 9, kind, like, xp=np)
    sums = "float64" if dtype == "float64" else "float32"
    pooled, pull = backend.pool_by_kernels(kind, x, expected_weights.astype(sums))
    wide = np.where(real[..., None], x, 0).astype("float64")
    expected, expected_pull = heads.pool(kind, wide, expected_weights, xp=backend.xp)
    tight = 8 * np.finfo(sums).eps
    assert pooled.dtype == sums
    np.testing.assert_allclose(pooled, expected, rtol=tight, atol=tight)
    cotangent = normal(*pooled.shape).astype(sums)
    np.testing.assert_allclose(pull(cotangent), expected_pull(cotangent), rtol=tight, atol=tight)


def test_keys_are_read_without_a_copy(backend: Any) -> None:
    wide = normal(2, 70, 3, 16).astype("float32")
    keys = wide.swapaxes(1, 2)[..., 8:]  # the sequence axis before the heads, a slice of wider rows
    state = backend.statistics(Summary(Moments(), "sequence", KERNELS), keys, None)
    whole = backend.statistics(
        Summary(Moments(), "sequence", KERNELS), np.ascontiguousarray(keys), None
    )
    for name, value in state.items():
        np.testing.assert_array_equal(value, whole[name])


# --- execution ------------------------------------------------------------------------------------

SEVERAL = (
    ("sh(20,3)+bn", {"m": 70, "key_mask": random_mask(2, 70)}),
    ("causal+bn(statistics=prefix)", {"m": 70, "d": 5}),
    ("bn(statistics=batch)", {"m": 40}),
)


@pytest.mark.parametrize("schedule", cuda_on_cpu.SCHEDULES)
def test_any_order_of_threads_gives_the_same_bits(backend: Any, schedule: str) -> None:
    for spec, call in SEVERAL:
        case = normal_case(spec, dtype=np.float64, n=3, **call)
        same_bits(backend, case, fused(backend, case), schedule)


SANITIZED = """
from emulated_checks import fused
from emulated_cupy import EmulatedBackend
from pdcore.backend.operands import Contracted
from pdcore.backend.score_contraction import scores, scores_vjp
from reference_cases import normal_case
from test_cupy_statistics import SEVERAL
backend = EmulatedBackend()
# Other tests run the kernels of scores.
backend.kernels.forward = lambda c, operands, heads, xp: Contracted(
    [scores(c, o, xp=xp, query_block=64, key_block=64) for o in operands])
backend.kernels.pullback = lambda *arguments, xp: scores_vjp(
    *arguments, xp=xp, query_block=64, key_block=64)
for spec, call in SEVERAL:
    case = normal_case(spec, n=3, **call)
    out, lse, vjp = backend.attention_vjp(fused(backend, case), case.inputs())
    vjp(out, lse)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing(sanitizer: str) -> None:
    launched = sanitized(SANITIZED, sanitizer)
    for name in MOMENTS | PREFIXES | POOLS:
        assert name in launched


# --- refusals -------------------------------------------------------------------------------------


def test_explain_says_what_runs() -> None:
    register()
    try:
        q, k, v = normal(3, 1, 2, 5, 4)

        def steps(spec: str) -> str:
            return str(pdcore.explain(q, k, v, spec, backend=NAME))

        assert "statistics: kernels, by chunks, each key read once, merged" in steps("bn")
        text = steps("causal+sh(1,2)+bn(statistics=prefix)")
        assert "statistics: kernels, by a scan of chunks in three passes, in float64" in text
        assert "pooling: kernels, each key and value read once, in float64" in text
        assert "own operations: no kernel computes GaussianMixture" in steps("mixture(2)")
        assert "own operations: no kernel" not in steps("conv1d")
        text = steps("softmax")
        assert "statistics: " not in text
        assert "pooling: " not in text
    finally:
        plugins.unregister_backend(NAME)


@pytest.mark.parametrize(
    ("shape", "capability", "reason"),
    [
        ((2, 4, 100, 8), 75, ""),
        ((2, 4, 100, 8), 70, "compute capability 7.0, and the kernels are for 7.5 and later"),
        ((2, 4, 100, 0), 90, "got D = 0"),
        ((2**16, 2**10, 31, 8), 90, ""),
        ((2**16, 2**10, 32, 8), 90, "a grid has 2147483647 by 65535 blocks"),
        ((1, 1, 2**31 - 1, 8), 90, ""),
        ((1, 1, 2**31, 8), 90, "got (1, 1, 2147483648, 8)"),
        ((1, 1, 5, 2**23), 90, "64 columns"),
    ],
)
def test_limits_are_known_before_a_launch(
    shape: tuple[int, ...], capability: int, reason: str
) -> None:
    message = limit(shape, capability)
    assert reason in message
    assert bool(message) == bool(reason)


@pytest.mark.parametrize(("spec", "refused"), [("bn", False), ("bn(statistics=prefix)", True)])
def test_the_pullback_of_prefixes_needs_a_grid_for_the_queries(spec: str, refused: bool) -> None:
    keys = (1, 2, 5, 4)
    queries = (1, 4, 2**30 + 1, 4)
    request = Request(pdcore.parse(spec), "cupy", "float32", "cuda:0", queries, keys, keys)
    plan = summarised(request.lower(), request, 90, "cupy")
    assert (plan.summary.choice == KERNELS) != refused
    assert ("got (1, 2, 1073741825, 4)" in plan.steps[-1]) == refused


def test_a_summary_that_was_not_fused_runs_by_array_calls() -> None:
    backend = EmulatedBackend()
    keys = normal(1, 2, 5, 4)
    for scope in ("sequence", "prefix"):
        backend.statistics(Summary(Moments(), scope), keys, None)
    backend.pool("mean", keys, np.ones((1, 5, 1)))
    assert not backend.runtime.launches


def test_prefix_statistics_of_one_sequence_without_keys() -> None:
    register()
    try:
        x = np.zeros((2, 0, 1), np.float32)
        out, _, vjp = pdcore.attention_vjp(x, x, x, "bn(statistics=prefix)", backend=NAME)
        assert vjp(np.asarray(out))["k"].shape == x.shape
    finally:
        plugins.unregister_backend(NAME)
