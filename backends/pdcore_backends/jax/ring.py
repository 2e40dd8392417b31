"""The contraction by scores over shards: keys are sent round a ring, results are merged by L.

Each pair of shards is a call of `.scores.contract`, at an offset that is the distance of the
shards; for pairs that cannot see each other the keys are sent but nothing is computed. As in
`.scores`, the derivative is a tangent that recomputes the weights from out and L of the whole
sequence, so it is a sum over the pairs, and a shard keeps only its arrays for it. In the derivative
the keys of a step are sent directly from the shard that holds them: keys that were sent round the
ring would have to be kept for every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pdcore.extend import ALL, NOTHING, SOME, Support, merged, pairs_seen

from .blocks import Arrays, StaticCall
from .namespace import NAMESPACE as xp
from .namespace import in_full
from .scores import checkpointed, contract, contract_tangents, divisor, nonzero
from .shards import MappedShards

__all__ = ["Ring", "around"]

Pair = tuple[Any, Any]
More = Callable[[Pair, StaticCall, Arrays], Pair]

_KEY_ARRAYS = frozenset({"k", "v", "key_bias", "key_mask", "key_index"})


@dataclass(frozen=True)
class Ring:
    """A contraction by scores with the keys of all shards.

    Attributes
    ----------
    call : StaticCall
        The contraction with the keys of this shard; its offset is that of the whole sequence.
    shards : MappedShards
    """

    call: StaticCall
    shards: MappedShards

    @cached_property
    def kinds(self) -> Any:
        """The kind of visibility of the keys of shard s to the queries of shard r, (P, P)."""
        call = self.call
        seen = call.visibility(call.rows, call.keys, call.offset)
        return pairs_seen(seen, self.shards.count)

    @cached_property
    def ways(self) -> tuple[int, int]:
        """The number of steps that keys are sent to later shards, and to earlier ones."""
        r, s = np.nonzero(self.kinds != NOTHING)
        up, down = int(max(0, *(r - s), 0)), int(max(0, *(s - r), 0))
        # Sending keys once round the ring reaches all shards.
        return (self.shards.count - 1, 0) if up + down >= self.shards.count - 1 else (up, down)

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        """The distances that keys are sent, in order."""
        up, down = self.ways
        return (*range(1, up + 1), *range(-1, -down - 1, -1))

    def local(self, arrays: Arrays) -> tuple[StaticCall, Arrays]:
        """Return the contraction with the keys of this shard."""
        call = self.call
        if not call.support.restricts or call.offset is None or call.rows != self.length:
            whole = np.all(np.diagonal(self.kinds) == ALL)
            return self.seeing(ALL if whole else SOME, 0, arrays)
        return call, arrays

    @property
    def length(self) -> int:
        """The number of keys of a shard before pooling, M."""
        return self.call.keys * self.call.scale

    def seeing(self, kind: int, by: Any, arrays: Arrays) -> tuple[StaticCall, Arrays]:
        """Return the contraction with the keys of the shard `by` places before."""
        call = self.call
        block = {name: x for name, x in arrays.items() if name != "offset"}
        if kind == ALL and not call.contraction.places:
            return replace(call, support=Support(), offset=0), block
        rank = self.shards.rank
        source = (rank - by) % self.shards.count
        distance = jnp.asarray(rank * call.rows - source * self.length, xp.int64)
        base: Any = arrays["offset"] if call.offset is None else call.offset
        block["offset"] = distance + base
        support = Support() if kind == ALL else call.support
        return replace(call, support=support, offset=None), block

    def add(self, total: Pair, by: Any, arrays: Arrays, more: More) -> Pair:
        """Add the result for the keys of the shard `by` places before, if any is visible."""
        kinds = sorted({int(kind) for shift in self.shifts for kind in self._along(shift)})

        def run(kind: int) -> Pair:
            return total if kind == NOTHING else more(total, *self.seeing(kind, by, arrays))

        if len(kinds) == 1:
            return run(kinds[0])
        rank = self.shards.rank
        branches = jnp.asarray(np.searchsorted(kinds, self.kinds))
        index = branches[rank, (rank - by) % self.shards.count]
        result: Pair = lax.switch(index, [partial(run, kind) for kind in kinds])
        return result

    def _along(self, shift: int) -> Any:
        ranks = np.arange(self.shards.count)
        return self.kinds[ranks, (ranks - shift) % self.shards.count]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def around(ring: Ring, arrays: Arrays) -> Pair:
    """Contract by scores with the keys of all shards; see `.scores.contract`."""
    signed = ring.call.contraction.signed

    def more(total: Pair, call: StaticCall, block: Arrays) -> Pair:
        return merged(signed, total, contract(call, block), xp=xp)

    total: Pair = contract(*ring.local(arrays))
    for steps, sign in zip(ring.ways, (1, -1), strict=True):
        if steps:
            total = _sent_round(ring, total, arrays, more, steps, sign)
    return total


def _sent_round(ring: Ring, total: Pair, arrays: Arrays, more: More, steps: int, sign: int) -> Pair:
    """Send keys from shard to shard, and add the result of each step."""

    def step(carry: tuple[Pair, Arrays], index: Any) -> tuple[tuple[Pair, Arrays], None]:
        total, block = carry
        block = ring.shards.sent(block, sign)
        return (ring.add(total, sign * index, {**arrays, **block}, more), block), None

    start = total, {name: x for name, x in arrays.items() if name in _KEY_ARRAYS}
    (total, _), _ = lax.scan(step, start, jnp.arange(1, steps + 1))
    return total


@partial(around.defjvp, symbolic_zeros=True)
@in_full()
def _around_jvp(ring: Ring, primals: tuple[Arrays], tangents: tuple[Arrays]) -> Any:
    [arrays] = primals
    out, level = around(ring, arrays)
    results = {**arrays, "out": out, "level": divisor(level)}
    return (out, level), checkpointed(partial(_tangents, ring), results, nonzero(tangents[0]))


def _tangents(ring: Ring, arrays: Arrays, moved: Arrays) -> Pair:
    def tangents_of(call: StaticCall, block: Arrays) -> Pair:
        parts = {n: x for n, x in block.items() if not n.startswith("d_")}
        moves = {n: x for n, x in block.items() if n.startswith("d_")}
        tangent = contract_tangents(call, parts, moves)
        return tangent["out"], tangent["level"]

    def more(total: Pair, call: StaticCall, block: Arrays) -> Pair:
        out, level = tangents_of(call, block)
        return total[0] + out, total[1] + level

    def step(total: Pair, index: Any) -> tuple[Pair, None]:
        def run(total: Pair, both: Arrays) -> Pair:
            fetched = _fetched(ring, index, both)
            return ring.add(total, jnp.asarray(ring.shifts)[index], fetched, more)

        return checkpointed(run, total, both), None

    both = {**arrays, **moved}
    total = tangents_of(*ring.local(both))
    if ring.shifts:
        total, _ = lax.scan(step, total, jnp.arange(len(ring.shifts)))
    return total


def _fetched(ring: Ring, index: Any, arrays: Arrays) -> Arrays:
    """Return the arrays with the keys of a step, sent from the shard that holds them."""
    home = {name: x for name, x in arrays.items() if name.removeprefix("d_") in _KEY_ARRAYS}
    ways = [partial(ring.shards.sent, home, shift) for shift in ring.shifts]
    return {**arrays, **(ways[0]() if len(ways) == 1 else lax.switch(index, ways))}
