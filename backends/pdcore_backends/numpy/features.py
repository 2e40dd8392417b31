"""Feature maps and their contraction, on all cores and in products that BLAS does not split."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from pdcore.extend import Features, Operands, feature_contraction

from . import threads
from .tiles import PRODUCTS

__all__ = ["features", "features_vjp"]

_ROWS = 1024  # rows of a block of phi: it and its temporaries stay in the L2 cache
_LARGE = 2**16  # numbers; below this, waking threads costs more than they save


def features(c: Features, o: Operands) -> tuple[Any, Any]:
    """Contract, see `feature_contraction.features`; phi is applied here if rows are raw."""
    out = np.empty((*o.q.shape[:-1], o.v.shape[-1]), o.v.dtype)
    level = np.empty(o.q.shape[:-1], o.v.dtype)
    whole = o.visibility.support.ahead != 0 and not c.log and c.raw

    def run(head: int) -> None:
        own = _head(o, head)
        at = (..., slice(head, head + 1), slice(None), slice(None))
        if whole and own.k.shape[-2]:
            _contract_blocks(c, own, out[(*at, slice(None))], level[at])
        else:
            own = _mapped(c, own)
            out[(*at, slice(None))], level[at] = feature_contraction.features(
                c, own, xp=xp, size=_chunk(own), tiled=True
            )

    threads.run(run, range(o.k.shape[-3]), _workers(o))
    return out, level


def _contract_blocks(c: Features, o: Operands, out: Any, level: Any) -> None:
    """Contract without causal support, phi block by block of rows."""
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
    """Pull back, see `feature_contraction.features_vjp`; through phi too if rows are raw."""
    grads = {"q": np.empty_like(o.q), "k": np.empty_like(o.k), "v": np.empty_like(o.v)}

    def run(head: int) -> None:
        rows = (..., slice(head, head + 1), slice(None), slice(None))
        values = (*rows, slice(None))
        own = _head(o, head)
        phi = _mapped(c, own)
        found = feature_contraction.features_vjp(
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
            for name, x in (("q", own.q), ("k", own.k)):
                found[name] = c.kernel.features_vjp(x, found[name], xp=xp, params={})[0]
        grads["q"][values] = found["q"]
        for name in ("k", "v"):
            grads[name][rows] = found[name]

    threads.run(run, range(o.k.shape[-3]), _workers(o))
    return grads


def _workers(o: Operands) -> int:
    return threads.count() if int(o.q.size) + int(o.k.size) >= _LARGE else 1


def _mapped(c: Features, o: Operands) -> Operands:
    if not c.raw:
        return o
    q, k = (c.kernel.features(x, xp=xp, params={}) for x in (o.q, o.k))
    return o._replace(q=q, k=k)


def _size(features: Any, values: Any) -> int:
    """Choose how many rows go into one product that BLAS does not split."""
    width = max(int(features.shape[-1]) * int(values.shape[-1]), 1)
    return max(1, min(feature_contraction.CHUNK, PRODUCTS // width))


def _head(o: Operands, head: int) -> Operands:
    """Cut one key head out of the operands; masks of keys are shared by all heads."""
    at = (..., slice(head, head + 1), slice(None), slice(None))
    return o._replace(q=o.q[(*at, slice(None))], k=o.k[at], v=o.v[at])


def _chunk(o: Operands) -> int:
    """Choose the chunk so that BLAS splits no product between its threads."""
    width, values = max(int(o.q.shape[-1]), 1), int(o.v.shape[-1]) + 1
    largest = min(math.isqrt(PRODUCTS // max(width, values)), PRODUCTS // (width * values))
    return max(4, min(feature_contraction.CHUNK, 1 << int(math.log2(max(largest, 1)))))
