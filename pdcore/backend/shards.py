"""A sequence that is cut over several devices or processes: what its shards exchange.

Shard r of P holds the queries r N .. (r + 1) N - 1 and the keys r M .. (r + 1) M - 1 of a
sequence, where N and M are the lengths of its arrays. A backend says how arrays travel in a
subclass of `Shards`; what is computed from them is here, and the steps of a plan in `.sharded`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np

from ..arrays import device_of
from ..lowering import Group, Plan, first_real
from ..spec import Statistics, Visibility, reduce_axis
from .call import Call
from .contract import Inputs
from .dropout import Dropout

__all__ = ["ALL", "NOTHING", "SOME", "ShardCall", "Shards", "pairs_seen"]

State = Mapping[str, Any]

#: The keys of another shard that the queries of a shard see: none, all or some.
NOTHING, ALL, SOME = range(3)


class Shards(ABC):
    """The shards of a sequence, and how arrays travel between them.

    Attributes
    ----------
    count : int
        The number of shards, P.
    rank : int or integer array ()
        The index r of this shard.
    xp : namespace
        The array-API namespace.
    """

    count: int
    xp: ClassVar[Any]

    @property
    @abstractmethod
    def rank(self) -> Any:
        """The index r of this shard."""

    @abstractmethod
    def gathered(self, arrays: State) -> dict[str, Any]:
        """Return the arrays of all shards, in their order on a new first axis; for small arrays."""

    @abstractmethod
    def added(self, x: Any) -> Any:
        """Return the sum over the shards."""

    @abstractmethod
    def highest(self, x: Any) -> Any:
        """Return the maximum over the shards, without a gradient."""

    def earlier(self, like: Any) -> Any:
        """Return which entries of a gathered array come from earlier shards."""
        index = self.xp.arange(self.count, device=device_of(like))
        return self.xp.reshape(index < self.rank, (self.count, *(1,) * (like.ndim - 1)))

    def merged(self, stats: Statistics, state: State) -> State:
        """Merge the states of all shards, in their order: the same bits on every shard."""
        return self._reduced(stats, self.gathered(state))

    def prefix_states(self, stats: Statistics, states: State) -> State:
        """Merge the states of the prefixes in this shard with the state of all earlier shards."""
        xp = self.xp
        totals = self.gathered({name: x[..., -1:, :] for name, x in states.items()})
        none = stats.zero(totals, xp=xp)
        before = self._reduced(
            stats, {n: xp.where(self.earlier(x), x, none[n]) for n, x in totals.items()}
        )
        return stats.merge(before, states, xp=xp)

    def _reduced(self, stats: Statistics, gathered: State) -> State:
        return {n: x[0] for n, x in reduce_axis(stats, gathered, 0, xp=self.xp).items()}

    def first_key(self, keys: Any, real: Any) -> Any:
        """Return the first real key (*B, H, 1, D) of all shards, mask (*B, 1, M) or None.

        Zeros where there is none.
        """
        xp = self.xp
        first = first_real(keys, real, xp=xp)
        has = xp.zeros_like(first[..., :1]) + (1 if keys.shape[-2] else 0)
        if real is not None:
            has = has * xp.astype(xp.any(real, axis=-1)[..., None, None], has.dtype)
        found = self.gathered({"first": first, "has": has})
        before = xp.cumulative_sum(found["has"], axis=0) - found["has"]
        chosen = (found["has"] > 0) & (before == 0)
        return xp.sum(xp.where(chosen, found["first"], xp.zeros_like(found["first"])), axis=0)


def pairs_seen(seen: Visibility, count: int) -> Any:
    """Return how the queries of shard r see the keys of shard s by position, integers (P, P).

    Parameters
    ----------
    seen : Visibility
        That of a shard; its offset is that of the whole sequence.
    count : int
        P.

    Returns
    -------
    array of NumPy
        `NOTHING`, `ALL` or `SOME`.
    """
    if not seen.support.restricts:
        return np.full((count, count), ALL)
    kinds = np.full((count, count), SOME)
    if not seen.static:
        return kinds
    for r in range(count):
        for s in range(count):
            pair = replace(seen, offset=seen.offset + r * seen.rows - s * seen.length)
            first, last = pair.key_range(0, pair.rows)
            if first >= last:
                kinds[r, s] = NOTHING
            elif pair.whole(0, pair.rows, 0, pair.keys):
                kinds[r, s] = ALL
    return kinds


class ShardCall(Call):
    """The arrays of one shard of a call; the offset is that of the whole sequence."""

    def __init__(
        self, backend: Any, plan: Plan, inputs: Inputs, shards: Shards, *, level: bool
    ) -> None:
        self.shards = shards
        super().__init__(backend, plan, inputs, level=level)

    def _offset(self) -> Any:
        if not isinstance(self.inputs.offset, str):
            return super()._offset()
        xp, shards, real = self.xp, self.shards, self.inputs.key_mask
        rows, length = self.q.shape[-2], self.k.shape[-2]
        if real is None:
            return shards.count * (length - rows)
        index = xp.arange(1, length + 1, dtype=xp.int64, device=self.device)
        index = xp.where(real, index + shards.rank * length, xp.zeros_like(index))
        end = xp.max(index, axis=-1) if length else xp.sum(index, axis=-1)
        return (shards.highest(end) - shards.count * rows)[..., None, None, None, None]

    def row_indices(self, dtype: Any) -> Any:
        """Return the indices of the queries in the whole sequence."""
        first = self.shards.rank * self.q.shape[-2]
        return super().row_indices(dtype) + self.xp.asarray(first, dtype=dtype)

    def dropout(self, group: Group) -> Dropout:
        """Return what drops the weights of a group, by the indices of the whole sequence."""
        return super().dropout(group)._replace(first=self.shards.rank * self.k.shape[-2])

    def visibility(self, group: Group, key_mask: Any) -> Visibility:
        """Return the visibility of a group in this shard, see `Call.visibility`."""
        seen = super().visibility(group, key_mask)
        values = {f.name: getattr(seen, f.name) for f in fields(seen)}
        return _ShardVisibility(**values, shards=self.shards)


@dataclass(frozen=True, kw_only=True)
class _ShardVisibility(Visibility):
    """The keys of a shard that its queries see; `counts` counts the keys of all shards.

    Attributes
    ----------
    shards : Shards
    """

    shards: Shards

    def counts(self, bias: Any = None, terms: Any = None) -> Any:
        """Count the visible keys of all shards, see `Visibility.counts`."""
        shards, real, xp = self.shards, self.key_mask, self.xp
        if real is not None:
            parts = shards.gathered({"real": xp.astype(real, xp.int64)})["real"]
            parts = xp.moveaxis(parts, 0, -2) > 0
            real = xp.reshape(parts, (*parts.shape[:-2], -1))
        return Visibility(
            self.support,
            xp,
            self.rows,
            self.length * shards.count,
            self.scale,
            self.offset + shards.rank * self.rows,
            real,
            None,
            None,
            self.device,
        ).counts()
