"""The contraction by scores over ranks: keys are sent to the queries that see them.

In step t every rank computes with the keys of the rank t places before, which that rank has sent,
while those of the next step are on their way; results merge by L. What is hidden by position is
neither sent nor computed. The pullback sends the keys again, and sends their gradients back: a rank
keeps only its own arrays, out and L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdcore.extend import (
    NOTHING,
    Operands,
    Scores,
    UnsupportedError,
    Visibility,
    merged,
    pairs_seen,
)

from . import namespace as xp
from .shards import RankedShards

__all__ = ["Pairs", "around"]

#: Contracts a pair of shards, and pulls back: the arguments of `score_contraction.scores_vjp`.
Contract = Callable[[Scores, Operands], tuple[Tensor, Tensor]]
PullBack = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Pairs:
    """How the pairs of shards of a call are computed.

    Attributes
    ----------
    shards : RankedShards
    contract : callable
        ``contract(c, o)`` computes (out, L) of a pair.
    pull_back : callable
        ``pull_back(c, o, out, level, d_out, d_level)``, with out and L of all pairs.
    """

    shards: RankedShards
    contract: Contract
    pull_back: PullBack


def around(pairs: Pairs, c: Scores, o: Operands) -> tuple[Tensor, Tensor]:
    """Contract by scores with the keys of all ranks; the offset is that of the whole sequence."""
    names = tuple(o.values)
    fixed = o._replace(q=None, k=None, v=None, key_bias=None, values={})
    arrays = (o.q, o.k, o.v, o.key_bias, *o.values.values())
    results: tuple[Tensor, Tensor] = _Around.apply(pairs, c, fixed, names, *arrays)
    return results


class _Around(torch.autograd.Function):  # type: ignore[misc]
    """The contraction over ranks, whose pullback computes the weights again, pair by pair."""

    @staticmethod
    def forward(
        ctx: Any, pairs: Pairs, c: Scores, fixed: Operands, names: tuple[str, ...], *arrays: Any
    ) -> tuple[Tensor, Tensor]:
        o = _with_arrays(fixed, names, arrays)
        out, level = pairs.contract(c, _pair(o, pairs.shards, pairs.shards.rank, _keys(o)))
        for step in _steps(pairs.shards, o):
            if step.keys:
                part = pairs.contract(c, _pair(o, pairs.shards, step.source, step.keys))
                out, level = merged(c.signed, (out, level), part, xp=xp)
        ctx.pairs, ctx.c, ctx.fixed, ctx.names = pairs, c, fixed, names
        ctx.save_for_backward(*arrays, out, level)
        return out, level

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "group: gradients of gradients are not written for shards; leave create_graph out"
            )
        *arrays, out, level = ctx.saved_tensors
        o, shards = _with_arrays(ctx.fixed, ctx.names, arrays), ctx.pairs.shards

        def pulled(source: int, keys: list[Tensor]) -> dict[str, Any]:
            pair = _pair(o, shards, source, keys)
            grads: dict[str, Any] = ctx.pairs.pull_back(ctx.c, pair, out, level, *d)
            return grads

        total = pulled(shards.rank, _keys(o))
        moved = [name for name in ("k", "v", "key_bias") if name in total]
        for step in _steps(shards, o):
            # Without keys the arrays say only what is received.
            grads = pulled(step.source, step.keys) if step.keys else total
            sent = [grads[name].contiguous() for name in moved]
            back = shards.exchanged(step.source if step.keys else None, sent, step.reader)
            if step.keys:
                for name in ("q", *ctx.names):
                    total[name] = total[name] + grads[name]
            for name, x in zip(moved, back(), strict=False):
                total[name] = total[name] + x
        return (None,) * 4 + tuple(total.get(n) for n in ("q", "k", "v", "key_bias", *ctx.names))


class _Step(NamedTuple):
    """What a rank does with another in a step.

    Attributes
    ----------
    source : int
        The rank whose keys are at hand.
    keys : list of Tensor
        Its arrays, as `_keys` lists them; none if they are hidden.
    reader : int or None
        The rank that computes with this rank's keys, if they are not hidden from it.
    """

    source: int
    keys: list[Tensor]
    reader: int | None


def _steps(shards: RankedShards, o: Operands) -> Iterator[_Step]:
    """Yield the steps after that of a rank's own keys; those of the next are on their way."""
    count, rank, own = shards.count, shards.rank, _keys(o)
    seen = pairs_seen(o.visibility, count) != NOTHING

    def started(step: int) -> tuple[int, int | None, Callable[[], list[Tensor]]]:
        source, reader = (rank - step) % count, (rank + step) % count
        to = reader if seen[reader, rank] else None
        keys = shards.exchanged(to, own, source if seen[rank, source] else None)
        return source, to, keys

    following = started(1) if count > 1 else None
    for step in range(1, count):
        assert following is not None
        source, reader, keys = following
        arrays = keys()
        following = started(step + 1) if step + 1 < count else None
        yield _Step(source, arrays, reader)


def _keys(o: Operands) -> list[Tensor]:
    """Return the arrays of the keys of a shard, as they are sent."""
    mask = o.visibility.key_mask
    arrays = [o.k, o.v, o.key_bias, None if mask is None else mask.to(torch.uint8)]
    return [x.contiguous() for x in arrays if x is not None]


def _pair(o: Operands, shards: RankedShards, source: int, keys: list[Tensor]) -> Operands:
    """Return the operands of this rank's queries with the keys of a rank."""
    seen, arrays = o.visibility, list(keys)
    mask = None if seen.key_mask is None else arrays.pop().bool()
    bias = None if o.key_bias is None else arrays.pop()
    known = {f.name: getattr(seen, f.name) for f in fields(Visibility)}
    first = source * seen.length
    known |= {"offset": seen.offset + shards.rank * seen.rows - first, "key_mask": mask}
    dropout = None if o.dropout is None else o.dropout._replace(first=first)
    k, v = arrays
    return o._replace(k=k, v=v, key_bias=bias, visibility=Visibility(**known), dropout=dropout)


def _with_arrays(fixed: Operands, names: tuple[str, ...], arrays: Any) -> Operands:
    """Return the operands with the arrays that have a gradient put back."""
    q, k, v, key_bias, *values = arrays
    return fixed._replace(
        q=q, k=k, v=v, key_bias=key_bias, values=dict(zip(names, values, strict=True))
    )
