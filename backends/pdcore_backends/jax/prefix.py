"""The moments of every prefix of the keys, chunk by chunk.

Within a chunk the mean of every prefix is subtracted from the keys of the prefix, which takes CHUNK
times the memory of the keys and is exact in results and gradients: a prefix of one key has a
deviation of exactly 0, whose gradient is multiplied by a factor of up to eps ** -1.5. The state of
the chunks before is merged with that of each prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from pdcore.extend import Mean, Moments, Statistics
from pdcore.extend import prefix_states as generic_prefix_states

from .chunks import cut, joined
from .namespace import NAMESPACE as xp
from .scores import checkpointed

__all__ = ["prefix_states"]

CHUNK = 16

State = Mapping[str, Any]


def prefix_states(stats: Statistics, keys: Any, mask: Any) -> State:
    """Compute the state of every prefix of the keys, the empty one included.

    For moments and means the program does not grow with the number of keys. Parameters and result
    are those of `pdcore.extend.prefix_states`.
    """
    *lead, length, _ = keys.shape
    if type(stats) not in (Mean, Moments) or not keys.size:
        return generic_prefix_states(stats, keys, mask, xp=xp)
    real = (
        jnp.ones((*lead, length, 1), keys.dtype)
        if mask is None
        else jnp.broadcast_to(mask, (*lead, length, 1)).astype(keys.dtype)
    )
    chunks = tuple(cut(x, CHUNK) for x in (keys, real))

    def within(keys: Any, real: Any) -> State:
        state = _within(keys, real)
        return state if type(stats) is Moments else {name: state[name] for name in ("n", "mean")}

    def step(before: State, chunk: tuple[Any, Any]) -> tuple[State, State]:
        merged = checkpointed(lambda a, b: stats.merge(a, within(*b), xp=xp), before, chunk)
        return {name: x[..., -1:, :] for name, x in merged.items()}, merged

    # The scan starts from the first chunk, so that its carry varies over devices.
    first = within(*(x[0] for x in chunks))
    last = {name: x[..., -1:, :] for name, x in first.items()}
    whole = {name: x[None] for name, x in first.items()}
    # A scan of no chunks would leave a derivative empty arrays, at which XLA of JAX 0.11.2 ends the
    # process where the sequence is cut into shards.
    if len(chunks[0]) > 1:
        _, rest = lax.scan(step, last, tuple(x[1:] for x in chunks))
        whole = {name: jnp.concat([x, rest[name]]) for name, x in whole.items()}
    empty = stats.zero(last, xp=xp)
    return {
        name: jnp.concat([empty[name], joined(x, length)], axis=-2) for name, x in whole.items()
    }


def _within(keys: Any, real: Any) -> State:
    """Compute the moments of every prefix of a chunk (..., C, D)."""
    size = keys.shape[-2]
    weights = jnp.tril(jnp.ones((size, size), keys.dtype)) * jnp.swapaxes(real, -1, -2)
    n = jnp.sum(weights, axis=-1, keepdims=True)
    mean = jnp.matmul(weights, keys) / jnp.maximum(n, 1.0)
    deviation = keys[..., None, :, :] - mean[..., :, None, :]
    return {"n": n, "mean": mean, "m2": jnp.sum(weights[..., None] * deviation**2, axis=-2)}
