"""Plans on NumPy arrays, with the contraction by scores compiled by Numba."""

from __future__ import annotations

import os
import threading
from typing import Any

import numba
import numpy as np
from threadpoolctl import ThreadpoolController

from pdcore.extend import ArrayBackend, Operands, Scores, Visibility

from . import INFO
from .fused import attend

__all__ = ["NumbaBackend"]

Array = np.ndarray[Any, Any]


class NumbaBackend(ArrayBackend):
    """An `ArrayBackend` that runs softmax-like scores in float32 by compiled code."""

    info = INFO

    def __init__(self) -> None:
        super().__init__()
        # One call at a time: a call uses all threads, and `workqueue`, Numba's only threading
        # layer without dependencies, must not be entered by two threads.
        self._lock = threading.Lock()
        self._blas = ThreadpoolController()

    def versions(self) -> dict[str, str]:
        """Return the versions of NumPy and of Numba."""
        return {"numpy": np.__version__, "numba": numba.__version__}

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores, by compiled code where it applies.

        `ArrayBackend` runs the rest: weights other than exp(scale s), an (N, M) mask or bias, and
        float64.
        """
        plain = c.weight == "log" and c.expression is None
        dense = o.bias is not None or o.visibility.mask is not None
        if not plain or dense or o.q.dtype != np.float32 or 0 in o.q.shape or 0 in o.v.shape:
            return super().scores(c, o)
        *lead, key_heads, group, rows, dim = o.q.shape
        q = np.ascontiguousarray(o.q).reshape(-1, rows, dim)
        k, v, key_bias = _keys(o)
        low, high = _seen(o.visibility)
        out = np.empty((*q.shape[:2], v.shape[-1]), np.float32)
        level = np.empty(q.shape[:2], np.float32)
        with self._lock, self._blas.limit(limits=1, user_api="blas"):
            # Numba's threads share heads and rows, so a BLAS product must stay in one thread.
            numba.set_num_threads(_threads())
            attend(
                q,
                k,
                v,
                key_bias,
                low,
                high,
                np.float32(c.scale),
                group,
                key_heads * group,
                out,
                level,
            )
        shape = (*lead, key_heads, group, rows)
        return out.reshape(*shape, v.shape[-1]), level.reshape(shape)


def _keys(o: Operands) -> tuple[Array, Array, Array]:
    """Return keys, values and key bias with sequences and heads on one axis, padding set to 0.

    Padding may hold NaN, and 0 times NaN is NaN, so a weight of 0 is not enough.
    """
    real, keys = o.visibility.key_mask, o.k.shape[-2]
    k, v, bias = o.k, o.v, o.key_bias
    if real is not None:
        k, v = (np.where(real[..., None], x, np.float32(0.0)) for x in (k, v))
        visible = np.zeros(o.k.shape[:-1], np.float32) if bias is None else bias
        bias = np.where(real, visible, np.float32(-np.inf))
    flat = np.zeros((0, 0), np.float32) if bias is None else bias.reshape(-1, keys)
    cells = (np.ascontiguousarray(x).reshape(-1, keys, x.shape[-1]) for x in (k, v))
    return *cells, np.ascontiguousarray(flat)  # type: ignore[return-value]


def _seen(visibility: Visibility) -> tuple[Array, Array]:
    """Return the range low:high of keys that each query sees by position, (B or 1, N)."""
    position = np.asarray(visibility.positions(0, visibility.rows))
    position = position.reshape(-1, visibility.rows)
    low = np.zeros_like(position)
    high = np.full_like(position, visibility.keys)
    if visibility.support.ahead != np.inf:
        high = (position + int(visibility.support.ahead) + 1) // visibility.scale
    if visibility.support.left != np.inf:
        low = -(-(position - int(visibility.support.left)) // visibility.scale)
    high = np.clip(high, 0, visibility.keys)
    return np.minimum(np.clip(low, 0, None), high), high


def _threads() -> int:
    wanted = int(os.environ.get("PDCORE_NUM_THREADS") or numba.config.NUMBA_NUM_THREADS)
    return max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
