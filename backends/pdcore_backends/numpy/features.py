"""Feature maps and their contraction, on all cores, by products too small for BLAS threads."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from pdcore.extend import (
    Features,
    FeatureScale,
    Operands,
    feature_contraction,
    largest_entry,
    largest_key,
    mapped,
    overflow_as_nan,
    scaled,
)

from . import threads
from .tiles import PRODUCTS

__all__ = ["features", "features_vjp"]

_ROWS = 1024  # rows of a block of phi, so that phi and its temporaries stay in the L2 cache
_LARGE = 2**16  # entries of q and k; below this, starting threads costs more than they save


def features(c: Features, o: Operands) -> tuple[Any, Any]:
    """Contract by features, see `feature_contraction.features`; applies phi where `c.raw`."""
    out = np.empty((*o.q.shape[:-1], o.v.shape[-1]), o.v.dtype)
    level = np.empty(o.q.shape[:-1], o.v.dtype)
    whole = o.visibility.support.ahead != 0 and not c.log and c.raw

    def run(head: int) -> None:
        part = _head(o, head)
        at = (..., slice(head, head + 1), slice(None), slice(None))
        if whole and part.k.shape[-2]:
            _contract_blocks(c, part, out[(*at, slice(None))], level[at])
        else:
            part, constant, _ = mapped(c, part, xp=xp)
            out[(*at, slice(None))], level[at] = feature_contraction.features(
                c, part, xp=xp, size=_chunk(part), tiled=True
            )
            level[at] += constant

    threads.run(run, range(o.k.shape[-3]), _workers(o))
    return out, level


def _contract_blocks(c: Features, o: Operands, out: Any, level: Any) -> None:
    """Contract without causal support, applying phi to one block of rows at a time."""
    mask, phi = o.visibility.key_mask, c.kernel
    largest = largest_key(o.k, mask, xp=xp)
    of_keys = phi.feature_scale(largest, xp=xp)
    state: Any = 0
    count: Any = 0
    for start in range(0, o.k.shape[-2], _ROWS):
        at = (..., slice(start, start + _ROWS), slice(None))
        k, _ = _scaled(phi, o.k[at], largest)
        k = phi.features(k, xp=xp, params={})
        if mask is not None:
            k = np.where(mask[..., start : start + _ROWS, None], k, 0)
        products = feature_contraction.Products(_size(k, o.v), xp)
        state = state + products.outer(k, o.v[at])
        count = count + k.sum(axis=-2)
    state, count = state[..., None, :, :], count[..., None, :, None]
    for start in range(0, o.q.shape[-2], _ROWS):
        at = (..., slice(start, start + _ROWS), slice(None))
        q, of_queries = _scaled(phi, o.q[at], _largest_entry(o.q[at]))
        q = phi.features(q, xp=xp, params={})
        products = feature_contraction.Products(_size(q, o.v), xp)
        weighted = products.rows(q, state)
        rows = (..., slice(start, start + _ROWS))
        constant = (of_queries.log + of_keys.log[..., None, :, :])[..., 0]
        if c.signed:
            out[at], level[rows] = weighted, constant
            continue
        total = overflow_as_nan(np.matmul(q, count), xp)
        none = total == 0
        # A quotient, because 1 / total overflows for small totals.
        np.divide(weighted, np.where(none, np.inf, total), out=out[at])
        level[rows] = np.where(none, -np.inf, np.log(np.where(none, 1, total)))[..., 0] + constant


def features_vjp(
    c: Features, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
) -> dict[str, Any]:
    """Pull back, see `feature_contraction.features_vjp`; also through phi where `c.raw`."""
    grads = {"q": np.empty_like(o.q), "k": np.empty_like(o.k), "v": np.empty_like(o.v)}

    def run(head: int) -> None:
        rows = (..., slice(head, head + 1), slice(None), slice(None))
        values = (*rows, slice(None))
        part = _head(o, head)
        phi, constant, pullback = mapped(c, part, xp=xp)
        results = out[values], level[rows] - constant, d_out[values], d_level[rows]
        cotangents = feature_contraction.features_vjp(
            c, phi, *results, xp=xp, size=_chunk(phi), tiled=True
        )
        cotangents = pullback(cotangents)
        grads["q"][values] = cotangents["q"]
        for name in ("k", "v"):
            grads[name][rows] = cotangents[name]

    threads.run(run, range(o.k.shape[-3]), _workers(o))
    return grads


def _scaled(phi: Any, x: Any, largest: Any) -> tuple[Any, FeatureScale]:
    """Scale rows, see `pdcore.extend.scaled`; rows whose scale is 1 are not copied."""
    scale = phi.feature_scale(largest, xp=xp)
    return scaled(phi, x, largest, xp=xp) if np.any(scale.log) else (x, scale)


def _largest_entry(x: Any) -> Any:
    """Return the largest entry of each row, by halves, as NumPy's maximum of a row is slow."""
    while x.shape[-1] > 4 and x.shape[-1] % 2 == 0:
        half = x.shape[-1] // 2
        x = np.maximum(x[..., :half], x[..., half:])
    return largest_entry(x, xp=xp)


def _workers(o: Operands) -> int:
    return threads.count(small=int(o.q.size) + int(o.k.size) < _LARGE)


def _size(features: Any, values: Any) -> int:
    """Return how many rows of one product keep it too small for BLAS threads."""
    width = max(int(features.shape[-1]) * int(values.shape[-1]), 1)
    return max(1, min(feature_contraction.CHUNK, PRODUCTS // width))


def _head(o: Operands, head: int) -> Operands:
    """Return the operands of one key head; key masks are shared by all heads."""
    at = (..., slice(head, head + 1), slice(None), slice(None))
    return o._replace(q=o.q[(*at, slice(None))], k=o.k[at], v=o.v[at])


def _chunk(o: Operands) -> int:
    """Return the chunk size that keeps every product too small for BLAS threads."""
    width, values = max(int(o.q.shape[-1]), 1), int(o.v.shape[-1]) + 1
    largest = min(math.isqrt(PRODUCTS // max(width, values)), PRODUCTS // (width * values))
    return max(4, min(feature_contraction.CHUNK, 1 << int(math.log2(max(largest, 1)))))
