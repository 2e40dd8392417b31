"""The moments of every prefix of the keys, chunk by chunk.

Within a chunk every prefix takes its own mean off its own keys, which needs chunk times as many
numbers as the keys have and loses no digit, in the gradient neither: a prefix of one key has a
deviation of exactly 0, whose gradient meets a factor of up to eps ** -1.5. The chunks before are
merged into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pdcore.statistics import Moments

from .namespace import NAMESPACE as xp

__all__ = ["prefix_moments"]

CHUNK = 16

State = Mapping[str, Any]


def prefix_moments(stats: Moments, keys: Any, mask: Any) -> State:
    """Compute the moments of every prefix of the keys, the empty one included.

    The program does not grow with the number of keys.

    Parameters
    ----------
    stats : Moments
        How two states are merged.
    keys : array (*B, H, M, D)
        Keys; where `mask` is False they are finite.
    mask : bool array broadcastable to (*B, H, M, 1), or None
        True for a real key.

    Returns
    -------
    mapping
        As `pdcore.statistics.prefix_states` gives it, (*B, H, M + 1, D) or (*B, H, M + 1, 1).
    """
    *lead, length, _ = keys.shape
    real = jnp.ones((*lead, length, 1), keys.dtype) if mask is None else \
        jnp.broadcast_to(mask, (*lead, length, 1)).astype(keys.dtype)  # fmt: skip
    more = -length % CHUNK
    chunks = tuple(_chunks(x, more) for x in (keys, real))
    # Zeros made from the keys vary over devices as they do.
    zero = jnp.sum(jnp.zeros_like(keys), axis=-2, keepdims=True)
    empty = {"n": jnp.sum(zero, axis=-1, keepdims=True), "mean": zero, "m2": zero}

    @jax.checkpoint
    def step(before: State, chunk: tuple[Any, Any]) -> tuple[State, State]:
        found = stats.merge(before, _within(*chunk), xp=xp)
        return {name: x[..., -1:, :] for name, x in found.items()}, found

    _, found = lax.scan(step, empty, chunks)
    states = {}
    for name, x in found.items():
        rows = jnp.moveaxis(x, 0, -3)
        rows = jnp.reshape(rows, (*lead, length + more, x.shape[-1]))
        states[name] = jnp.concat([empty[name], rows[..., :length, :]], axis=-2)
    return states


def _within(keys: Any, real: Any) -> State:
    """Give the moments of every prefix of a chunk (..., C, D)."""
    size = keys.shape[-2]
    weights = jnp.tril(jnp.ones((size, size), keys.dtype)) * jnp.swapaxes(real, -1, -2)
    n = jnp.sum(weights, axis=-1, keepdims=True)
    mean = jnp.matmul(weights, keys) / jnp.maximum(n, 1.0)
    deviation = keys[..., None, :, :] - mean[..., :, None, :]
    return {"n": n, "mean": mean, "m2": jnp.sum(weights[..., None] * deviation**2, axis=-2)}


def _chunks(x: Any, more: int) -> Any:
    """Put chunks on an axis in front, after `more` rows of zeros at the end."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])
    return jnp.moveaxis(jnp.reshape(x, (*x.shape[:-2], -1, CHUNK, x.shape[-1])), -3, 0)
