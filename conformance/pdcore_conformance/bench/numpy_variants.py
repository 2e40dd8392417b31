"""Softmax attention in plain NumPy, in three variants: the baseline of the NumPy backend.

All are vectorized and compute in the dtype of the arrays. Which is the fastest depends on the shape
and the machine, so the baseline is the fastest one there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["VARIANTS"]

Array = np.ndarray[Any, Any]


def textbook(q: Array, k: Array, v: Array) -> Array:
    """Compute attention by the formula, with a new array for every step."""
    scores: Array = q @ k.swapaxes(-1, -2) * q.dtype.type(q.shape[-1] ** -0.5)
    weights: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    out: Array = np.matmul(weights, v)
    return out


def in_place(q: Array, k: Array, v: Array) -> Array:
    """Compute attention in one array of scores; scale the query, and divide the result."""
    scores = np.matmul(q * q.dtype.type(q.shape[-1] ** -0.5), k.swapaxes(-1, -2))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    out: Array = np.matmul(scores, v)
    out /= scores.sum(axis=-1, keepdims=True)
    return out


def head_by_head(q: Array, k: Array, v: Array) -> Array:
    """Compute attention one head at a time, in one array of scores that all heads share."""
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    scores = np.empty((q.shape[-2], k.shape[-2]), q.dtype)
    scale = q.dtype.type(q.shape[-1] ** -0.5)
    for at in np.ndindex(*q.shape[:-2]):
        np.matmul(q[at] * scale, k[at].T, out=scores)
        np.subtract(scores, scores.max(axis=-1, keepdims=True), out=scores)
        np.exp(scores, out=scores)
        np.matmul(scores, v[at], out=out[at])
        out[at] /= scores.sum(axis=-1, keepdims=True)
    return out


#: The variants by name.
VARIANTS: Mapping[str, Callable[[Array, Array, Array], Array]] = {
    "textbook": textbook,
    "in place": in_place,
    "head by head": head_by_head,
}
