"""Derivatives along a direction, by differences of the oracle in longdouble."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pdcore.reference import reference_attention

from .budget import differentiated

__all__ = ["along", "directional"]

Array = np.ndarray[Any, Any]
WIDE = np.longdouble

#: Weights of the central difference of order 8, for steps of 1, 2, 3 and 4.
_WEIGHTS = (4 / WIDE(5), -1 / WIDE(5), 4 / WIDE(105), -1 / WIDE(280))
#: The truncation error, of order h^8, and rounding, of order eps / h, are both below 1e-16.
_STEP = WIDE(1e-3)


def directional(
    q: Array, k: Array, v: Array, spec: str, directions: Mapping[str, Array]
) -> dict[str, Array]:
    """Differentiate out and lse along directions of q, k and v.

    Returns
    -------
    dict of str to array
        ``out`` and ``lse``, in longdouble.
    """

    def at(moved: Mapping[str, Array]) -> dict[str, Array]:
        out, lse = reference_attention(moved["q"], moved["k"], moved["v"], spec, return_lse=True)
        return {"out": out, "lse": lse}

    return _difference(at, {"q": q, "k": k, "v": v}, directions)


def along(
    q: Array,
    k: Array,
    v: Array,
    spec: str,
    directions: Mapping[str, Array],
    d_out: Array,
    d_lse: Array,
) -> dict[str, Array]:
    """Differentiate the gradients by q, k and v along directions of q, k and v.

    Returns
    -------
    dict of str to array
        ``q``, ``k`` and ``v``: the derivative of each gradient, in longdouble.
    """

    def at(moved: Mapping[str, Array]) -> dict[str, Array]:
        found = differentiated(spec, moved, {}, (d_out, d_lse))
        return {name: found[f"d_{name}"] for name in ("q", "k", "v")}

    return _difference(at, {"q": q, "k": k, "v": v}, directions)


def _difference(
    function: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    arrays: Mapping[str, Array],
    directions: Mapping[str, Array],
) -> dict[str, Array]:
    total: dict[str, Array] = {}
    for count, weight in enumerate(_WEIGHTS, start=1):
        for sign in (1, -1):
            moved = {
                name: x.astype(WIDE) + sign * count * _STEP * directions[name].astype(WIDE)
                for name, x in arrays.items()
            }
            for name, value in function(moved).items():
                finite = np.where(np.isfinite(value), value, 0)  # lse of an empty row stays -inf
                total[name] = total.get(name, 0) + sign * weight * finite / _STEP
    return total
