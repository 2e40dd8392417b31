"""Judge calls whose statistics or scores overflow: each result is right, or is no number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pdcore.reference import reference_attention

from .budget import EPS, Expected, expect, widened
from .calls import Call, drawn
from .layouts import Array

__all__ = ["expect_nearby", "overflow_excused"]

#: How many inputs near the given ones the oracle computes.
_NEARBY = 4


@np.errstate(all="ignore")
def expect_nearby(call: Call) -> Expected:
    """Compute the results of a call, and what rounding its inputs changes in them.

    The reference in the tested dtype would overflow too. In its place is the oracle of inputs that
    differ by roundings of the dtype, where it differs most from the oracle.
    """
    arrays = drawn(call)
    wide: Any = np.longdouble if call.dtype == "float64" else np.float64
    exact = expect(arrays.q, arrays.k, arrays.v, call.spec, **arrays.options)
    low = dict(exact.oracle)
    rng = np.random.default_rng(0)
    for _ in range(_NEARBY):
        q, k = (
            x.astype(wide) * (1 + 2 * EPS[call.dtype] * rng.uniform(-1, 1, x.shape))
            for x in (arrays.q, arrays.k)
        )
        v, options = arrays.v.astype(wide), widened(arrays.options, wide)
        out, lse = reference_attention(q, k, v, call.spec, return_lse=True, **options)
        near = {"out": out, "lse": lse}
        for name, x in exact.oracle.items():
            farther = abs(near[name] - x) > abs(low[name] - x)
            low[name] = np.where(farther, near[name], low[name])
    low = {name: x.astype(exact.low[name].dtype) for name, x in low.items()}
    return exact._replace(low=low)


@np.errstate(all="ignore")
def overflow_excused(got: Mapping[str, Array], expected: Expected) -> dict[str, Array]:
    """Return results with the expected values in place of NaN and of infinite outputs.

    An lse of -inf is not excused: it says that a row sees no key.
    """
    excused = {}
    for name, x in got.items():
        visible = np.isnan(x) | (np.isinf(x) if name == "out" else x == np.inf)
        excused[name] = np.where(visible, expected.oracle[name].astype(x.dtype), x)
    return excused
