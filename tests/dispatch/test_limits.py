"""Arguments at the limits of their types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pdcore

SPECS = [
    "softmax",
    "causal",
    "sparse(2,2)",
    "causal+linear",
    "causal+bn(statistics=prefix)",
    "causal+sh(1,3)",
]
LARGE = [2**62, 2**63 - 4, 2**63 - 1, 2**63, 2**64 - 1, 10**30]
NUMBERS = [*LARGE, *(-x for x in LARGE), 2**31, 2**31 - 1, -(2**31)]


def call(spec: str, offset: Any, convert: Any = np.asarray) -> Any:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 2, 6, 4)).astype(np.float32)
    return np.asarray(pdcore.attention(*map(convert, (q, k, v)), spec, offset=offset))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("offset", NUMBERS)
def test_offsets_near_the_ends_of_64_bits(spec: str, offset: int) -> None:
    want = call(spec, 20 if offset > 0 else -20)
    np.testing.assert_array_equal(call(spec, offset), want)
    for dtype in (np.int64, np.uint64):
        if np.iinfo(dtype).min <= offset <= np.iinfo(dtype).max:
            both = np.array([offset, offset], dtype=dtype)
            np.testing.assert_allclose(call(spec, both), want, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(call(spec, both[0]), want, rtol=1e-5, atol=1e-6)


def test_a_large_offset_in_a_window_as_wide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^offset: got 4611686018427387904 .*window so wide"):
        call(f"sparse({2**62},0)", 2**62)


@pytest.mark.parametrize("spec", ["bn", "iebn"])
@pytest.mark.parametrize("size", [1e20, 1e30])
def test_moments_beyond_float32_are_nan(spec: str, size: float) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 6, 4)).astype(np.float32)
    k *= np.float32(size)
    params = {"slope": np.ones((2, 4), np.float32), "shift": np.ones((2, 4), np.float32)}
    with np.errstate(all="ignore"):
        out = pdcore.attention(q, k, v, spec, params=params if spec == "iebn" else None)
    assert np.isnan(out).all()
