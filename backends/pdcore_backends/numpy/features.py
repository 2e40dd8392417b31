"""Feature maps and their contraction, on all cores, by products too small for BLAS threads."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from pdcore.extend import Features, Operands, feature_contraction

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
            part = _mapped(c, part)
            out[(*at, slice(None))], level[at] = feature_contraction.features(
                c, part, xp=xp, size=_chunk(part), tiled=True
            )

    threads.run(run, range(o.k.shape[-3]), _workers(o))
    return out, level


def _contract_blocks(c: Features, o: Operands, out: Any, level: Any) -> None:
    """Contract without causal support, applying phi to one block of rows at a time."""
    mask = o.visibility.key_mask
    state: Any = 0
    count: Any = 0
    for start in range(0, o.k.shape[-2], _ROWS):
        at = (..., slice(start, start + _ROWS), slice(None))
        k = c.kernel.features(o.k[at], xp=xp, params={})
        if mask is not None:
            k = np.where(mask[..., start : start + _ROWS, None], k, 0)
        products = feature_contraction.Products(_size(k, o.v), xp)
        state = state + products.outer(k, o.v[at])
        count = count + k.sum(axis=-2)
    state, count = state[..., None, :, :], count[..., None, :, None]
    for start in range(0, o.q.shape[-2], _ROWS):
        at = (..., slice(start, start + _ROWS), slice(None))
        q = c.kernel.features(o.q[at], xp=xp, params={})
        products = feature_contraction.Products(_size(q, o.v), xp)
        weighted = products.rows(q, state)
        rows = (..., slice(start, start + _ROWS))
        if c.signed:
            out[at], level[rows] = weighted, 0
            continue
        total = np.matmul(q, count)
        none = total == 0
        divisor = np.where(none, 1, total)
        np.multiply(weighted, np.where(none, 0, 1 / divisor), out=out[at])
        level[rows] = np.where(none, -np.inf, np.log(divisor))[..., 0]


def features_vjp(
    c: Features, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
) -> dict[str, Any]:
    """Pull back, see `feature_contraction.features_vjp`; also through phi where `c.raw`."""
    grads = {"q": np.empty_like(o.q), "k": np.empty_like(o.k), "v": np.empty_like(o.v)}

    def run(head: int) -> None:
        rows = (..., slice(head, head + 1), slice(None), slice(None))
        values = (*rows, slice(None))
        part = _head(o, head)
        phi = _mapped(c, part)
        cotangents = feature_contraction.features_vjp(
            c,
            phi,
            out[values],
            level[rows],
            d_out[values],
            d_level[rows],
            xp=xp,
            size=_chunk(phi),
            tiled=True,
        )
        if c.raw:
            for name, x in (("q", part.q), ("k", part.k)):
                cotangents[name] = c.kernel.features_vjp(x, cotangents[name], xp=xp, params={})[0]
        grads["q"][values] = cotangents["q"]
        for name in ("k", "v"):
            grads[name][rows] = cotangents[name]

    threads.run(run, range(o.k.shape[-3]), _workers(o))
    return grads


def _workers(o: Operands) -> int:
    return threads.count(small=int(o.q.size) + int(o.k.size) < _LARGE)


def _mapped(c: Features, o: Operands) -> Operands:
    """Apply phi to queries and keys, unless they are features already."""
    if not c.raw:
        return o
    q, k = (c.kernel.features(x, xp=xp, params={}) for x in (o.q, o.k))
    return o._replace(q=q, k=k)


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
