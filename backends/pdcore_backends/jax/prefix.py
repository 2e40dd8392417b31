"""The moments of every prefix of the keys, chunk by chunk.

Within a chunk every prefix takes its own mean off its own keys, which needs chunk times as many
numbers as the keys have and loses no digit, in the gradient neither: a prefix of one key has a
deviation of exactly 0, whose gradient meets a factor of up to eps ** -1.5. The chunks before are
merged into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from pdcore.extend import Moments, Statistics
from pdcore.extend import prefix_states as states_of_any

from .chunks import cut, joined
from .namespace import NAMESPACE as xp
from .scores import checkpointed

__all__ = ["prefix_states"]

CHUNK = 16

State = Mapping[str, Any]


def prefix_states(stats: Statistics, keys: Any, mask: Any) -> State:
    """Compute the state of every prefix of the keys, the empty one included.

    For moments the program does not grow with the number of keys. Parameters and result are those
    of `pdcore.extend.prefix_states`.
    """
    *lead, length, _ = keys.shape
    if type(stats) is not Moments or not keys.size:
        return states_of_any(stats, keys, mask, xp=xp)
    real = (
        jnp.ones((*lead, length, 1), keys.dtype)
        if mask is None
        else jnp.broadcast_to(mask, (*lead, length, 1)).astype(keys.dtype)
    )
    chunks = tuple(cut(x, CHUNK) for x in (keys, real))

    def step(before: State, chunk: tuple[Any, Any]) -> tuple[State, State]:
        merged = checkpointed(lambda a, b: stats.merge(a, _within(*b), xp=xp), before, chunk)
        return {name: x[..., -1:, :] for name, x in merged.items()}, merged

    # The first chunk is where the scan begins, so that what it carries varies over devices.
    first = _within(*(x[0] for x in chunks))
    last = {name: x[..., -1:, :] for name, x in first.items()}
    _, rest = lax.scan(step, last, tuple(x[1:] for x in chunks))
    empty = stats.zero(last, xp=xp)
    states = {}
    for name, x in rest.items():
        rows = joined(jnp.concat([first[name][None], x]), length)
        states[name] = jnp.concat([empty[name], rows], axis=-2)
    return states


def _within(keys: Any, real: Any) -> State:
    """Give the moments of every prefix of a chunk (..., C, D)."""
    size = keys.shape[-2]
    weights = jnp.tril(jnp.ones((size, size), keys.dtype)) * jnp.swapaxes(real, -1, -2)
    n = jnp.sum(weights, axis=-1, keepdims=True)
    mean = jnp.matmul(weights, keys) / jnp.maximum(n, 1.0)
    deviation = keys[..., None, :, :] - mean[..., :, None, :]
    return {"n": n, "mean": mean, "m2": jnp.sum(weights[..., None] * deviation**2, axis=-2)}
