"""Attention over a sequence in shards: ``axis_name`` inside `jax.shard_map`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax.numpy as jnp

from pdcore.extend import (
    Inputs,
    Operands,
    Plan,
    Scores,
    ShardedSteps,
    plan_of_shard,
    score_contraction,
)

from .choice import ByBlocks
from .local import LocalJaxBackend
from .namespace import NAMESPACE as xp
from .ring import Ring, around
from .scores import prepared
from .shards import MappedShards

__all__ = ["KEYS_TRAVEL", "attention"]

#: How keys and values come to the queries of other shards, for `explain`.
KEYS_TRAVEL = "keys travel round a ring of ppermute"


def attention(plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
    """Run a plan on one shard of a sequence, see `Backend.attention`."""
    assert inputs.axis_name is not None
    shards = MappedShards.along(inputs.axis_name)
    plan = plan_of_shard(plan, inputs, shards)
    return _backend(shards).attention(plan, inputs._replace(axis_name=None), lse=lse)


class ShardedBackend(ShardedSteps, LocalJaxBackend):
    """Runs plans on one of the shards of an axis."""

    shards: MappedShards

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores with the keys of all shards."""
        if not (o.q.size and o.k.size):
            return score_contraction.scores(c, o, xp=xp)
        columns = o.v.shape[-1]
        if not columns:  # L is needed nevertheless
            o = o._replace(v=jnp.zeros_like(o.k[..., :1]))
        call, arrays = prepared(c, o, turns=isinstance(c.choice, ByBlocks) and c.choice.turns)
        out, level = around(Ring(call, self.shards), arrays)
        out = jnp.reshape(out, (*o.q.shape[:-1], -1))
        return out[..., :columns], jnp.reshape(level, o.q.shape[:-1])


@lru_cache(maxsize=64)
def _backend(shards: MappedShards) -> ShardedBackend:
    return ShardedBackend(shards)
