"""Attention over a sequence in shards: ``axis_name`` inside `jax.shard_map`.

A shard runs the plan on its arrays; only the steps that need other shards are replaced: the
statistics, the point that a transform subtracts from the keys, and the two contractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from jax import lax

from pdcore.extend import (
    BatchRows,
    ConstantFeature,
    Features,
    Fold,
    GaussianRows,
    Inputs,
    KeySet,
    KeyShift,
    Normalize,
    Operands,
    Plan,
    Pullback,
    Recentre,
    Request,
    Rows,
    ScaledRows,
    Scores,
    Statistics,
    Transform,
    UnsupportedError,
    central,
    divide,
    feature_contraction,
    finite,
    largest_key,
    score_contraction,
)

from .choice import ByBlocks
from .local import LocalJaxBackend
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
    transforms = tuple(_with_one_point(step, shards) for step in plan.transforms)
    plan, inputs = replace(plan, transforms=transforms), inputs._replace(axis_name=None)
    return _backend(shards).attention(plan, inputs, lse=lse)


def refusals(request: Request) -> list[str]:
    """Return why a call cannot run in shards, see `Backend.refusals`."""
    plan, rows, length = request.lower(), request.q[-2], request.k[-2]
    about = f"shards along {request.axis_name!r}"
    reasons = []
    for scale in sorted({g.scale for g in plan.groups if length % g.scale}):
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
    if plan.summary is not None and isinstance(plan.summary.statistics, KeySet):
        [word] = [step.word for step in plan.transforms if isinstance(step, Normalize)]
        reasons.append(
            f"{about}: {word} needs all keys of the sequence at "
            "once; write it with statistics of a fixed size"
        )
    what = _aligned(plan)
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
    """Return a plan that states in its steps what shards exchange."""
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
        exchange = "an exclusive scan of" if plan.support.ahead == 0 else "psum of"
        steps.append(f"shards along {axis!r}: {exchange} the sums of phi(k) v")
    return replace(plan, steps=(*plan.steps, *steps))


def _aligned(plan: Plan) -> str | None:
    """Return which part of a plan needs equal positions of queries and keys in a shard."""
    if plan.prefix:
        return "prefix statistics"
    c, support = plan.contraction, plan.support
    by_sums = (isinstance(c, Features) or c.weight != "log") and support.left == float("inf")
    return "causal features" if by_sums and support.ahead == 0 else None


def _check(plan: Plan, inputs: Inputs) -> None:
    c = plan.contraction
    if plan.normaliser != "sum" and isinstance(c, Scores) and c.removing:
        raise UnsupportedError(
            f"h({plan.normaliser}): keys of other shards that a table removes by -inf would be "
            f"counted; use h(sum) with axis_name={inputs.axis_name!r}"
        )
    # A request does not hold the value of an offset.
    what = _aligned(plan)
    if what is not None and isinstance(inputs.offset, int) and inputs.offset:
        raise UnsupportedError(
            f"offset: got {inputs.offset}, expected 0: with axis_name={inputs.axis_name!r}, {what} "
            "need the queries of a shard at the positions of its keys"
        )


@dataclass(frozen=True)
class _BatchRowsOfShards:
    """`BatchRows` about the first real key of all shards."""

    rows: BatchRows
    shards: Shards

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        shift = self.shards.first_key(rows.k, rows.key_mask)
        return self.rows.about(shift, rows, state, params, xp=xp)


@dataclass(frozen=True)
class _GaussianOfShards:
    """`GaussianRows` about a point among the keys of all shards."""

    gaussian: GaussianRows
    shards: Shards

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        # Distances do not depend on the point.
        local = lax.stop_gradient(central(rows.k, rows.key_mask, xp=xp))
        has = jnp.ones_like(local[..., :1])
        if rows.key_mask is not None:
            has = has * jnp.any(rows.key_mask, axis=-1)[..., None, None]
        count, total = self.shards.added((has, jnp.where(has > 0, local, 0)))
        shift = total / jnp.maximum(count, 1)
        return self.gaussian.between(rows.q - shift, rows.k - shift, rows.key_mask, xp=xp)


@dataclass(frozen=True)
class _ScaleOfShards:
    """`ScaledRows` by the largest entry of the keys of all shards."""

    scale: ScaledRows
    shards: Shards

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        largest = self.shards.highest(largest_key(rows.k, rows.key_mask, xp=xp))
        return self.scale.below(largest, rows, xp=xp)


def _unshifted(rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
    return rows, lambda d: (d, {}, {})


def _with_one_point(step: Transform, shards: Shards) -> Transform:
    """Return a transform that has the same point or scale on all shards."""
    if isinstance(step, Fold | Recentre) and step.of == "prefix":
        return replace(step, choice=_BatchRowsOfShards(step, shards))
    if isinstance(step, ConstantFeature) and isinstance(step.rows, Fold | Recentre):
        return replace(step, rows=_BatchRowsOfShards(step.rows, shards))
    if isinstance(step, KeyShift):
        return replace(step, choice=_unshifted)  # shards contract in float32
    if isinstance(step, GaussianRows):
        return replace(step, choice=_GaussianOfShards(step, shards))
    if isinstance(step, ScaledRows):
        return replace(step, choice=_ScaleOfShards(step, shards))
    return step


class ShardedBackend(LocalJaxBackend):
    """Runs plans on one of the shards of an axis."""

    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self.shards = shards

    def call(self, plan: Plan, inputs: Inputs, *, level: bool = True) -> ShardCall:
        """Return the arrays of a shard as a call."""
        return ShardCall(self, plan, inputs, self.shards, level=level)

    def merged(self, stats: Statistics, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Merge the states of all shards."""
        return self.shards.merged(stats, state)

    def first_key(self, keys: Any, real: Any) -> Any:
        """Return the first real key of all shards."""
        return self.shards.first_key(keys, real)

    def prefix_states(self, stats: Statistics, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute the state of every prefix that ends in this shard."""
        return self.shards.prefix_states(stats, keys, mask)

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

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features with the keys of all shards."""
        if not o.k.shape[-2]:
            return feature_contraction.features(c, o, xp=xp)
        sums, top = _sums(c, o)
        if o.visibility.support.ahead != 0:
            high = self.shards.highest(top)
            sums = self.shards.added(sums * jnp.exp(top - high))
            return _by_sums(c, o.q, sums, high)
        local = super().features(c, o)
        return merged(c.signed, _by_sums(c, o.q, *self._before(sums, top)), local)

    def _before(self, sums: Any, top: Any) -> tuple[Any, Any]:
        """Compute the sums over earlier shards; arrays of later shards have no influence."""
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
    """Compute the sums of phi(k) [v, 1] exp(-top) over keys, (*B, H, F, Dv + 1), and top."""
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
    products = jnp.matmul(q, sums[..., None, :, :])
    weighted, total = products[..., :-1], products[..., -1:]
    if c.signed:
        return weighted, jnp.zeros_like(total[..., 0])
    return divide(weighted, total, exponent, xp=xp)
