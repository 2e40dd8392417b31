"""How the arrays of a call lie in memory, and the order of their axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["Array", "laid_out", "swap_axes"]

Array = np.ndarray[Any, Any]


def swap_axes(x: Array) -> Array:
    """Return an array (*B, H, N, D) as (*B, N, H, D), contiguous, or back."""
    return np.ascontiguousarray(np.swapaxes(x, -2, -3))


def laid_out(x: Array, layout: str) -> Array:
    """Return an array of equal values with this layout in memory."""
    match layout:
        case "":
            return x
        case "strided":  # the transpose of (..., M, N)
            return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
        case "transposed":  # (*B, N, H, D) in memory, as projections leave it
            return np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)
        case "sliced":
            wide = np.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), math.nan, x.dtype)
            wide[..., ::2, :] = x
            return wide[..., ::2, :]
        case "reversed":
            return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]
        case "broadcast":  # the first sequence repeated, with stride 0
            return np.broadcast_to(x[:1], x.shape)
        case "packed":  # a slice of one array that holds q, k and v
            wide = np.full((*x.shape[:-1], 3 * x.shape[-1]), math.nan, x.dtype)
            wide[..., x.shape[-1] : 2 * x.shape[-1]] = x
            return wide[..., x.shape[-1] : 2 * x.shape[-1]]
        case "readonly":
            x.setflags(write=False)
            return x
        case _:
            raise ValueError(f"layout: got {layout!r}, expected one that Call describes")
