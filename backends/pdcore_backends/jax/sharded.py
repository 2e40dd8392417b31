"""Attention over a sequence in shards: ``axis_name`` inside `jax.shard_map`.

What a shard does is the generic run of a plan on its own arrays; only the steps that need other
shards are replaced: the statistics, the point amid the keys that a transform subtracts, and the
two contractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from jax import lax

from pdcore.extend import (
    AttentionSpec,
    FeatureMap,
    Features,
    Fold,
    GaussianRows,
    Inputs,
    KeySet,
    Operands,
    Plan,
    Request,
    Rows,
    Scores,
    Statistics,
    Transform,
    UnsupportedError,
    divide,
    feature_contraction,
    finite,
    score_contraction,
)

from .impl import Blocked, JaxBackend
from .namespace import NAMESPACE as xp
from .ring import Ring, around, merged
from .scores import prepared
from .shards import ShardCall, Shards

__all__ = ["attention", "described", "refusals"]


def attention(plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
    """Run a plan on one shard of a sequence, see `Backend.attention`."""
    assert inputs.axis_name is not None
    shards = Shards.along(inputs.axis_name)
    _check(plan, inputs)
    transforms = tuple(_shared(step, shards) for step in plan.transforms)
    plan, inputs = replace(plan, transforms=transforms), inputs._replace(axis_name=None)
    return _backend(shards).attention(plan, inputs, lse=lse)


def refusals(request: Request) -> list[str]:
    """Say why a call cannot run in shards, see `Backend.refusals`."""
    spec, rows, length = request.spec, request.q[-2], request.k[-2]
    about = f"shards along {request.axis_name!r}"
    reasons = []
    for scale in sorted({s for s in spec.heads.scales if length % s}):
        reasons.append(
            f"{about}: {length} keys in a shard are no multiple of the scale {scale}, so a window "
            "would straddle two shards; cut the sequence at multiples of it"
        )
    for name in ("mask", "bias"):
        if getattr(request, name) is not None:
            reasons.append(
                f"{about}: {name} has entries for pairs of queries and keys, which meet from all "
                "shards; say what it does by key_mask, causal or a window"
            )
    if request.vjp or request.weights:
        name = "attention_vjp" if request.vjp else "attention_weights"
        reasons.append(f"{about}: {name} is not written for them; differentiate attention by JAX")
    if isinstance(spec.normalization.statistics_state(), KeySet):
        reasons.append(
            f"{about}: {spec.normalization.word} needs all keys of the sequence at "
            "once; write it with statistics of a fixed size"
        )
    what = _aligned(spec)
    if what is not None:
        if rows != length:
            reasons.append(
                f"{about}: {what} with {rows} queries and {length} keys in a shard; "
                "give it equally many"
            )
        if request.offset not in ("int", "end") or (
            request.offset == "end" and request.key_mask is not None
        ):
            reasons.append(f"{about}: {what} with an offset ({request.offset}); expected 0")
    return reasons


def described(plan: Plan, axis: str) -> Plan:
    """Add to the steps of a plan what shards exchange."""
    steps = []
    if plan.summary is not None:
        steps.append(
            f"shards along {axis!r}: statistics "
            + (
                "by an exclusive scan"
                if plan.summary.scope == "prefix"
                else "merged by psum, never a mean of means"
            )
        )
    if isinstance(plan.contraction, Scores):
        steps.append(
            f"shards along {axis!r}: keys travel round a ring of ppermute; results merge "
            "by log-sum-exp"
        )
    else:
        how = "an exclusive scan of" if plan.spec.support.ahead == 0 else "psum of"
        steps.append(f"shards along {axis!r}: {how} the sums of phi(k) v")
    return replace(plan, steps=(*plan.steps, *steps))


def _aligned(spec: AttentionSpec) -> str | None:
    """Say what in a spec needs the queries of a shard at the positions of its keys."""
    if spec.prefix:
        return "prefix statistics"
    support = spec.support
    by_sums = isinstance(spec.kernel, FeatureMap) and support.left == float("inf")
    return "causal features" if by_sums and support.ahead == 0 else None


def _check(plan: Plan, inputs: Inputs) -> None:
    # A request does not hold the value of an offset.
    what = _aligned(plan.spec)
    if what is not None and isinstance(inputs.offset, int) and inputs.offset:
        raise UnsupportedError(
            f"offset: got {inputs.offset}, expected 0: with axis_name={inputs.axis_name!r}, {what} "
            "need the queries of a shard at the positions of its keys"
        )


@dataclass(frozen=True)
class _Fold(Fold):
    """`Fold`, with the first real key of all shards."""

    shards: Shards | None = None

    def first(self, rows: Rows, *, xp: Any) -> Any:
        assert self.shards is not None
        return self.shards.first_key(rows.k, rows.key_mask)


@dataclass(frozen=True)
class _GaussianRows(GaussianRows):
    """`GaussianRows`, with a point amid the keys of all shards."""

    shards: Shards | None = None

    def centre(self, rows: Rows, *, xp: Any) -> Any:
        # The value does not depend on it.
        assert self.shards is not None
        own = lax.stop_gradient(super().centre(rows, xp=xp))
        has = jnp.ones_like(own[..., :1])
        if rows.key_mask is not None:
            has = has * jnp.any(rows.key_mask, axis=-1)[..., None, None]
        count, total = self.shards.added((has, jnp.where(has > 0, own, 0)))
        return total / jnp.maximum(count, 1)


def _shared(step: Transform, shards: Shards) -> Transform:
    """Give a transform that subtracts the same point on all shards."""
    if isinstance(step, Fold):
        return _Fold(step.batch, step.scale, step.split, step.closed, shards)
    return _GaussianRows(step.gamma, shards) if isinstance(step, GaussianRows) else step


class ShardedBackend(JaxBackend):
    """Runs a plan on one shard; made for the shards of one axis."""

    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self.shards = shards

    def call(self, plan: Plan, inputs: Inputs) -> ShardCall:
        """Take the arrays of a shard."""
        return ShardCall(self, plan, inputs, self.shards)

    def merged(self, stats: Statistics, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Merge the states of all shards."""
        return self.shards.merged(stats, state)

    def first_key(self, keys: Any, real: Any) -> Any:
        """Give the first real key of all shards."""
        return self.shards.first_key(keys, real)

    def prefix_states(self, stats: Statistics, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Give the state of every prefix that ends in this shard."""
        return self.shards.prefix_states(stats, keys, mask)

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores with the keys of all shards."""
        if not (o.q.size and o.k.size):
            return score_contraction.scores(c, o, xp=xp)
        columns = o.v.shape[-1]
        if not columns:  # L is wanted all the same
            o = o._replace(v=jnp.zeros_like(o.k[..., :1]))
        call, arrays = prepared(c, o, turns=isinstance(c, Blocked) and c.turns)
        out, level = around(Ring(call, self.shards), arrays)
        out = jnp.reshape(out, (*o.q.shape[:-1], -1))
        return out[..., :columns], jnp.reshape(level, o.q.shape[:-1])

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features with the keys of all shards."""
        if not o.k.shape[-2]:
            return feature_contraction.features(c, o, xp=xp)
        sums, top = _sums(c, o)
        if o.visibility.support.ahead != 0:
            high = self.shards.highest(top)
            sums = self.shards.added(sums * jnp.exp(top - high))
            return _by_sums(c, o.q, sums, high)
        own = super().features(c, o)
        return merged(c.signed, _by_sums(c, o.q, *self._before(sums, top)), own)

    def _before(self, sums: Any, top: Any) -> tuple[Any, Any]:
        """Add up what earlier shards have; nothing of a later one takes part."""
        parts, tops = self.shards.gathered((sums, top))
        earlier = self.shards.earlier(parts)
        tops = lax.stop_gradient(tops)
        high = finite(jnp.max(jnp.where(earlier, tops, -jnp.inf), axis=0), xp)
        scale = jnp.exp(jnp.where(earlier, tops - high, 0.0))
        return jnp.sum(jnp.where(earlier, parts, 0.0) * scale, axis=0), high


@lru_cache(maxsize=64)
def _backend(shards: Shards) -> ShardedBackend:
    return ShardedBackend(shards)


def _sums(c: Features, o: Operands) -> tuple[Any, Any]:
    """Add up phi(k) [v, 1] exp(-top) over a shard's keys, (*B, H, F, Dv + 1), and give top."""
    values = jnp.concat([o.v, jnp.ones_like(o.k[..., :1])], axis=-1)
    k, real = o.k, o.visibility.key_mask
    if real is not None:
        k = jnp.where(real[..., None], k, -jnp.inf if c.log else 0.0)
    top = jnp.zeros_like(k[..., :1, :])
    if c.log:
        top = finite(lax.stop_gradient(jnp.max(k, axis=-2, keepdims=True)), xp)
        k = jnp.exp(k - top)
    return jnp.matmul(jnp.matrix_transpose(k), values), jnp.matrix_transpose(top)


def _by_sums(c: Features, q: Any, sums: Any, top: Any) -> tuple[Any, Any]:
    """Contract queries with sums over keys; see `feature_contraction.features`."""
    exponent = jnp.zeros_like(q[..., :1])
    if c.log:
        q = q + jnp.matrix_transpose(top)[..., None, :, :]
        exponent = lax.stop_gradient(jnp.max(q, axis=-1, keepdims=True))
        q = jnp.exp(q - exponent)
    found = jnp.matmul(q, sums[..., None, :, :])
    weighted, total = found[..., :-1], found[..., -1:]
    if c.signed:
        return weighted, jnp.zeros_like(total[..., 0])
    return divide(weighted, total, exponent, xp=xp)
