"""Causal sums of feature maps, chunk by chunk, by programs that do not grow with the sequence.

The algorithm is that of `feature_contraction.prefix_contract`, with its loops as `lax.scan` and
`lax.map`. Every iteration is checkpointed: a derivative keeps the state before each chunk and the
arguments, O(N + M). The lowest finite number stands for the log of a feature of 0, because
`jax_debug_infs` rejects -inf among the arrays that a derivative keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pdcore.extend import chunks, feature_contraction, stop_gradient

from .chunks import cut, joined
from .namespace import NAMESPACE as xp
from .scores import checkpointed

__all__ = ["prefix_contract"]


def prefix_contract(
    a: Any,
    counts: Any,
    k: Any,
    v: Any,
    *,
    xp: Any,
    first: Callable[[int], int | None],
    log: bool = False,
    step: int = 1,
    size: int = feature_contraction.CHUNK,
) -> tuple[Any, Any]:
    """Compute sum_{j < c_i} (a_i . k_j) v_j, see `feature_contraction.prefix_contract`."""
    rows = a.shape[-2]
    if not (a.size and k.size):
        return feature_contraction.prefix_contract(
            a, counts, k, v, xp=xp, first=first, log=log, step=step, size=size
        )
    if log:  # padding is -inf
        k = jnp.maximum(k, _lowest(k))
    k, v = chunks(k, size, _lowest(k) if log else 0.0, step, xp), chunks(v, size, 0.0, step, xp)
    states, tops = _running(k, v) if log else (_sums(k, v), None)
    index, width = _places(counts, first, rows, step, size)
    blocks = {
        "a": cut(a, size),
        # Padding rows see the keys of the last row, and are removed from the result.
        "seen": cut(counts, size, mode="edge") - _in_front(index)[..., None, None] * size,
        "k": _windows(k, index, width),
        "v": _windows(v, index, width),
        "state": _windows(states, index, 1)[..., 0, :, :],
    }
    if tops is not None:
        blocks["top"] = _windows(tops, index, 1)[..., 0, :, :]
    summed, exponent = (joined(x, rows) for x in lax.map(_turn, blocks))
    return summed, exponent


def _turn(arrays: dict[str, Any]) -> tuple[Any, Any]:
    """Contract a block of rows with the state before its window of keys, and with these keys."""
    return checkpointed(_block, arrays)


def _block(arrays: dict[str, Any]) -> tuple[Any, Any]:
    a, state = arrays["a"], arrays["state"]
    k, v = (jnp.reshape(x, (*x.shape[:-3], -1, x.shape[-1])) for x in (arrays["k"], arrays["v"]))
    exponent = jnp.zeros_like(a[..., :1])
    if "top" in arrays:
        running = arrays["top"]
        top = _base(stop_gradient(jnp.maximum(running, jnp.max(k, axis=-2, keepdims=True)), xp))
        a = a + top
        exponent = stop_gradient(jnp.max(a, axis=-1, keepdims=True), xp)
        a, k = jnp.exp(a - exponent), jnp.exp(k - top)
        state = state * jnp.swapaxes(jnp.exp(running - top), -1, -2)
    w = jnp.matmul(a, jnp.swapaxes(k, -1, -2))
    w = jnp.where(jnp.arange(k.shape[-2]) < arrays["seen"], w, 0.0)
    summed = jnp.matmul(a, state) + jnp.matmul(w, v)
    return summed, jnp.broadcast_to(exponent, (*summed.shape[:-1], 1))


def _lowest(k: Any) -> float:
    """Return the log feature that stands for -inf."""
    return float(jnp.finfo(k.dtype).min)


def _base(top: Any) -> Any:
    """Replace the lowest number, the maximum of no key, by 0, from which exp makes it 0."""
    return jnp.where(top == _lowest(top), 0.0, top)


def _sums(k: Any, v: Any) -> Any:
    """Compute the sums of k_j v_j over the chunks before each chunk."""
    sums = jnp.matmul(jnp.swapaxes(k, -1, -2), v)
    before = jnp.cumsum(sums[..., :-1, :, :], axis=-3)
    return jnp.concat([jnp.zeros_like(sums[..., :1, :, :]), before], axis=-3)


def _running(k: Any, v: Any) -> tuple[Any, Any]:
    """Compute these sums for log features, relative to a running maximum; return both."""

    def after(before: tuple[Any, Any] | None, block: Any, values: Any) -> tuple[Any, Any]:
        higher = jnp.max(block, axis=-2, keepdims=True)
        if before is not None:
            higher = jnp.maximum(before[1], higher)
        higher = stop_gradient(higher, xp)
        base = _base(higher)
        state = jnp.matmul(jnp.swapaxes(jnp.exp(block - base), -1, -2), values)
        if before is not None:
            state = state + before[0] * jnp.swapaxes(jnp.exp(before[1] - base), -1, -2)
        return state, higher

    def step(before: tuple[Any, Any], chunk: tuple[Any, Any]) -> tuple[Any, Any]:
        return checkpointed(after, before, *chunk), before

    k, v = (jnp.moveaxis(x, -3, 0) for x in (k, v))
    # The scan starts from the first chunk, so that its carry varies over devices.
    _, later = lax.scan(step, after(None, k[0], v[0]), (k[1:], v[1:]))
    first = jnp.zeros_like(later[0][:1]), jnp.full_like(later[1][:1], _lowest(later[1]))
    states, tops = (jnp.concat(pair) for pair in zip(first, later, strict=True))
    return jnp.moveaxis(states, 0, -3), jnp.moveaxis(tops, 0, -3)


def _places(
    counts: Any, first: Callable[[int], int | None], rows: int, step: int, size: int
) -> tuple[Any, int]:
    """Return the first chunk of the window of each block of rows, and its length in chunks."""
    known = [(first(start), first(min(start + size, rows) - 1)) for start in range(0, rows, size)]
    if known[0][0] is None:
        return counts[..., ::size, 0] // size, step + 1
    begin = np.array([low // size for low, _ in known])  # type: ignore[operator]
    end = np.array([-(-high // size) for _, high in known])  # type: ignore[operator]
    return begin, max(1, int(np.max(end - begin)))


def _in_front(index: Any) -> Any:
    return jnp.moveaxis(jnp.asarray(index), -1, 0)


def _windows(x: Any, index: Any, width: int) -> Any:
    """Return `width` chunks (..., C, F) from each place on; blocks of rows are the first axis."""
    count = index.shape[-1]
    places = index[..., None] + np.arange(width)
    if index.size == count:  # the places are the same for all sequences
        places = jnp.reshape(places, (count, width))
        return jnp.moveaxis(jnp.take(x, places, axis=-3), -4, 0)
    flat = jnp.reshape(places, (*places.shape[:-2], -1, 1, 1))
    windows = jnp.take_along_axis(x, flat, axis=-3)
    shape = (*windows.shape[:-3], count, width, *windows.shape[-2:])
    return jnp.moveaxis(jnp.reshape(windows, shape), -4, 0)
