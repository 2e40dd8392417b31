"""The steps of a plan on one shard of a sequence.

Only the steps that need other shards are replaced: the statistics, the point that a transform
subtracts from the keys, and the contractions. A backend mixes `ShardedSteps` into its own class and
adds its contraction by scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..arrays import constant
from ..errors import UnsupportedError
from ..lowering import (
    BatchRows,
    ConstantFeature,
    Features,
    Fold,
    GaussianRows,
    KeyShift,
    Normalize,
    Plan,
    Pullback,
    Recentre,
    Rows,
    ScaledRows,
    Scores,
    Transform,
    central,
    largest_key,
)
from ..spec import KeySet, Statistics
from . import feature_contraction
from .array_backend import ArrayBackend
from .call import Call
from .contract import Inputs, Request
from .operands import Operands
from .score_contraction import divide, finite
from .shards import ShardCall, Shards

__all__ = ["ShardedSteps", "merged", "plan_of_shard", "shard_refusals", "told"]

Pair = tuple[Any, Any]


def merged(signed: bool, a: Pair, b: Pair, *, xp: Any) -> Pair:
    """Compute (out, L) of the union of two disjoint sets of keys."""
    if signed:
        return a[0] + b[0], a[1]
    base = finite(constant(xp.maximum(a[1], b[1]), xp), xp)[..., None]
    left, right = (xp.exp(level[..., None] - base) for _, level in (a, b))
    return divide(a[0] * left + b[0] * right, left + right, base, xp=xp)


class ShardedSteps(ArrayBackend):
    """Runs plans on one of the shards of a sequence, by the steps of the class beside it.

    Attributes
    ----------
    shards : Shards
    """

    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self.shards = shards

    def call(self, plan: Plan, inputs: Inputs, *, level: bool = True) -> Call:
        """Return the arrays of a shard as a call that reads L, by which results merge."""
        return ShardCall(self, plan, inputs, self.shards, level=True)

    def merged(self, stats: Statistics, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Merge the states of all shards."""
        return self.shards.merged(stats, state)

    def first_key(self, keys: Any, real: Any) -> Any:
        """Return the first real key of all shards."""
        return self.shards.first_key(keys, real)

    def prefix_states(self, stats: Statistics, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute the state of every prefix that ends in this shard."""
        return self.shards.prefix_states(stats, super().prefix_states(stats, keys, mask))

    def features(self, c: Features, o: Operands) -> Pair:
        """Contract by features with the keys of all shards."""
        xp = self.xp
        if not o.k.shape[-2]:
            return feature_contraction.features(c, o, xp=xp)
        sums, top = _sums(c, o, xp)
        if o.visibility.support.ahead != 0:
            high = self.shards.highest(top)
            return _by_sums(c, o.q, self.shards.added(sums * xp.exp(top - high)), high, xp)
        before = _by_sums(c, o.q, *self._before(sums, top), xp)
        return merged(c.signed, before, super().features(c, o), xp=xp)

    def _before(self, sums: Any, top: Any) -> Pair:
        """Compute the sums over earlier shards; arrays of later shards have no influence."""
        xp, found = self.xp, self.shards.gathered({"sums": sums, "top": top})
        parts, tops = found["sums"], constant(found["top"], xp)
        earlier, zero = self.shards.earlier(parts), xp.zeros_like(tops)
        high = finite(xp.max(xp.where(earlier, tops, zero - xp.inf), axis=0), xp)
        scale = xp.exp(xp.where(earlier, tops - high, zero))
        return xp.sum(xp.where(earlier, parts, xp.zeros_like(parts)) * scale, axis=0), high


def _sums(c: Features, o: Operands, xp: Any) -> Pair:
    """Compute the sums of phi(k) [v, 1] exp(-top) over keys, (*B, H, F, Dv + 1), and top."""
    values = xp.concat([o.v, xp.ones_like(o.k[..., :1])], axis=-1)
    k, real = o.k, o.visibility.key_mask
    if real is not None:
        hidden = xp.zeros_like(k)
        k = xp.where(real[..., None], k, hidden - xp.inf if c.log else hidden)
    top = xp.zeros_like(k[..., :1, :])
    if c.log:
        top = finite(constant(xp.max(k, axis=-2, keepdims=True), xp), xp)
        k = xp.exp(k - top)
    return xp.matmul(xp.matrix_transpose(k), values), xp.matrix_transpose(top)


def _by_sums(c: Features, q: Any, sums: Any, top: Any, xp: Any) -> Pair:
    """Contract queries with sums over keys; see `feature_contraction.features`."""
    exponent = xp.zeros_like(q[..., :1])
    if c.log:
        q = q + xp.matrix_transpose(top)[..., None, :, :]
        exponent = constant(xp.max(q, axis=-1, keepdims=True), xp)
        q = xp.exp(q - exponent)
    products = xp.matmul(q, sums[..., None, :, :])
    weighted, total = products[..., :-1], products[..., -1:]
    if c.signed:
        return weighted, xp.zeros_like(total[..., 0])
    return divide(weighted, total, exponent, xp=xp)


# The plan of a shard.


def plan_of_shard(plan: Plan, inputs: Inputs, shards: Shards) -> Plan:
    """Return a plan whose transforms have the same point or scale on all shards.

    Raises
    ------
    UnsupportedError
        For what `shard_refusals` cannot know: the value of an offset, and entries of tables.
    """
    c = plan.contraction
    if plan.normaliser != "sum" and isinstance(c, Scores) and c.removing:
        raise UnsupportedError(
            f"h({plan.normaliser}): keys of other shards that a table removes by -inf would be "
            f"counted; use h(sum) with {inputs.sharding}"
        )
    what = _aligned(plan)
    if what is not None and isinstance(inputs.offset, int) and inputs.offset:
        raise UnsupportedError(
            f"offset: got {inputs.offset}, expected 0: with {inputs.sharding}, {what} need the "
            "queries of a shard at the positions of its keys"
        )
    return replace(plan, transforms=tuple(_with_one_point(t, shards) for t in plan.transforms))


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
        local = constant(central(rows.k, rows.key_mask, xp=xp), xp)
        has = xp.ones_like(local[..., :1])
        if rows.key_mask is not None:
            real = xp.any(rows.key_mask, axis=-1)[..., None, None]
            has = has * xp.astype(real, has.dtype)
        count = self.shards.added(has)
        total = self.shards.added(xp.where(has > 0, local, xp.zeros_like(local)))
        shift = total / xp.where(count > 0, count, xp.ones_like(count))
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


# What backends say before a call.


def shard_refusals(request: Request) -> list[str]:
    """Return why a call cannot run in shards, see `Backend.refusals`."""
    plan, rows, length = request.lower(), request.q[-2], request.k[-2]
    about = f"shards by {request.sharding}"
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
        how = {"jax": "JAX", "torch": "PyTorch"}.get(request.library, request.library)
        reasons.append(f"{about}: {name} is not written for them; differentiate attention by {how}")
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


def told(plan: Plan, request: Request, keys: str) -> Plan:
    """Return a plan that states in its steps what shards exchange; `keys` says how keys travel."""
    about, steps = f"shards by {request.sharding}", []
    if plan.summary is not None:
        how = "by an exclusive scan" if plan.summary.scope == "prefix" else "in the order of shards"
        steps.append(f"{about}: statistics gathered and merged {how}, never a mean of means")
    if isinstance(plan.contraction, Scores):
        steps.append(f"{about}: {keys}; results merge by log-sum-exp")
    else:
        exchange = "an exclusive scan of" if plan.support.ahead == 0 else "the sum over shards of"
        steps.append(f"{about}: {exchange} the sums of phi(k) v")
    return replace(plan, steps=(*plan.steps, *steps))


def _aligned(plan: Plan) -> str | None:
    """Return which part of a plan needs equal positions of queries and keys in a shard."""
    if plan.prefix:
        return "prefix statistics"
    c, support = plan.contraction, plan.support
    by_sums = (isinstance(c, Features) or c.weight != "log") and support.left == float("inf")
    return "causal features" if by_sums and support.ahead == 0 else None
