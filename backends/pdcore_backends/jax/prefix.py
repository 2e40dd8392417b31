"""The statistics of every prefix of the keys, key by key in all chunks of the keys at once.

Each key is merged with the keys before it in its chunk, and each of these prefixes with the chunks
before. The deviation of one key is exactly 0, and so are its gradients, which are multiplied by a
factor of up to eps ** -1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pdcore.extend import Mean, Moments, Statistics
from pdcore.extend import prefix_states as generic_prefix_states

from .chunks import cut, joined
from .namespace import NAMESPACE as xp
from .scores import checkpointed

__all__ = ["prefix_states"]

#: The most keys of a chunk. One loop has a step for each key of a chunk, one for each chunk.
CHUNK = 128

State = Mapping[str, Any]


def prefix_states(stats: Statistics, keys: Any, mask: Any) -> State:
    """Compute the state of every prefix of the keys, the empty one included.

    For moments and means the program does not grow with the number of keys. Parameters and result
    are those of `pdcore.extend.prefix_states`.
    """
    *lead, length, _ = keys.shape
    if type(stats) not in (Mean, Moments) or not keys.size:
        return generic_prefix_states(stats, keys, mask, xp=xp)
    size = min(CHUNK, length)
    # Keys on the first axis, each with an axis of rows. Padding is after all keys.
    real = None if mask is None else jnp.broadcast_to(mask, (*lead, length, 1))
    by_key = [None if x is None else _by_key(x, size) for x in (keys, real)]
    within = _merged(stats, lambda x: stats.of(*x, xp=xp), by_key)
    if size < length:
        merged = _merged(stats, lambda state: state, {n: x[-1] for n, x in within.items()})
        before = {n: jnp.concat([_none(x[:1]), x[:-1]]) for n, x in merged.items()}
        within = stats.merge(before, within, xp=xp)
    whole = {name: joined(jnp.moveaxis(x[..., 0, :], 0, -2), length) for name, x in within.items()}
    return {name: jnp.concat([_none(x[..., :1, :]), x], axis=-2) for name, x in whole.items()}


def _by_key(x: Any, size: int) -> Any:
    """Return rows (..., M, F) as (size, C, ..., 1, F), C chunks of `size` rows."""
    return jnp.moveaxis(cut(x, size), -2, 0)[..., None, :]


def _merged(stats: Statistics, state_of: Callable[[Any], State], blocks: Any) -> State:
    """Merge the state of each block of keys with those before it on the first axis."""

    def step(before: State, block: Any) -> tuple[State, State]:
        merged = stats.merge(before, state_of(block), xp=xp)
        return merged, merged

    first = state_of(jax.tree.map(lambda x: x[0], blocks))
    start = {name: _none(x) for name, x in first.items()}
    merged: State = lax.scan(partial(checkpointed, step), start, blocks)[1]
    return merged


def _none(x: Any) -> Any:
    """Return zeros like `x` that vary over devices as `x` does."""
    return jnp.where(False, x, 0)
