"""A sequence cut along a mesh axis: the exchange between its shards, and the call of one shard.

Shard r of P holds the queries r N .. (r + 1) N - 1 and the keys r M .. (r + 1) M - 1 of a
sequence, where N and M are the lengths of its arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax.numpy as jnp
from jax import lax

from pdcore.extend import (
    Call,
    Group,
    Inputs,
    Mean,
    Plan,
    Statistics,
    Visibility,
    first_real,
    reduce_axis,
)

from .namespace import NAMESPACE as xp
from .prefix import prefix_states

__all__ = ["ShardCall", "Shards"]

State = Mapping[str, Any]


@dataclass(frozen=True)
class Shards:
    """The shards of a sequence.

    Attributes
    ----------
    axis : str
        The name of the mapped axis.
    count : int
        The number of shards, P.
    """

    axis: str
    count: int

    @classmethod
    def along(cls, axis: str) -> Shards:
        """Return the shards along an axis.

        Raises
        ------
        ValueError
            Where no such axis is mapped.
        """
        try:
            return cls(axis, lax.axis_size(axis))
        except NameError:
            raise ValueError(
                f"axis_name: got {axis!r}, expected the name of a mapped axis; call it inside "
                f"jax.shard_map over a mesh that has an axis {axis!r}, along which the sequence is "
                "cut"
            ) from None

    @property
    def rank(self) -> Any:
        """The index r of this shard."""
        return lax.axis_index(self.axis)

    def sent(self, x: Any, by: int) -> Any:
        """Return the pytree `x` of the shard `by` places before."""
        ranks = range(self.count)
        return lax.ppermute(x, self.axis, [(r, (r + by) % self.count) for r in ranks])

    def added(self, x: Any) -> Any:
        """Return the sum over the shards."""
        return lax.psum(x, self.axis)

    def highest(self, x: Any) -> Any:
        """Return the maximum over the shards, without a gradient."""
        return lax.pmax(lax.stop_gradient(x), self.axis)

    def gathered(self, x: Any) -> Any:
        """Return the arrays of all shards on a new first axis; for small arrays."""
        return lax.all_gather(x, self.axis)

    def earlier(self, like: Any) -> Any:
        """Return which entries of a gathered array come from earlier shards."""
        before = jnp.arange(self.count) < self.rank
        return jnp.reshape(before, (self.count, *(1,) * (like.ndim - 1)))

    def first(self, x: Any, has: Any) -> Any:
        """Return `x` of the first shard in which `has` is true; zeros if it is true in none."""
        place = jnp.where(has, self.rank, self.count)
        least = lax.pmin(place, self.axis)
        return self.added(jnp.where(has & (place == least), x, 0))

    # Statistics

    def merged(self, stats: Statistics, state: State) -> State:
        """Merge the states of all shards."""
        if not isinstance(stats, Mean):
            return self._reduced(stats, {name: self.gathered(x) for name, x in state.items()})
        n = self.added(state["n"])
        share = state["n"] / jnp.where(n > 0, n, 1)
        mean = self.added(share * state["mean"])
        # A second sum corrects the rounding error of the first, which is in proportion to |mean|.
        mean = mean + self.added(share * (state["mean"] - mean))
        merged = {"n": n, "mean": mean}
        if "m2" in state:
            distance = state["mean"] - mean
            merged["m2"] = self.added(state["m2"] + state["n"] * distance * distance)
        return merged

    def prefix_states(self, stats: Statistics, keys: Any, mask: Any) -> State:
        """Compute the state of every prefix that ends in this shard; see `.prefix`."""
        local = prefix_states(stats, keys, mask)
        totals = {name: self.gathered(x[..., -1:, :]) for name, x in local.items()}
        none = stats.zero(totals, xp=xp)
        before = self._reduced(
            stats, {name: jnp.where(self.earlier(x), x, none[name]) for name, x in totals.items()}
        )
        return stats.merge(before, local, xp=xp)

    def _reduced(self, stats: Statistics, gathered: State) -> State:
        return {name: x[0] for name, x in reduce_axis(stats, gathered, 0, xp=xp).items()}

    def first_key(self, keys: Any, real: Any) -> Any:
        """Return the first real key (*B, H, 1, D) of all shards, mask (*B, 1, M) or None."""
        local = first_real(keys, real, xp=xp)
        has: Any = keys.shape[-2] > 0
        return self.first(local, has if real is None else jnp.any(real, axis=-1)[..., None, None])


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
        rows, length = self.q.shape[-2], self.k.shape[-2]
        shards, real = self.shards, self.inputs.key_mask
        if real is None:
            return shards.count * (length - rows)
        index = shards.rank * length + jnp.arange(1, length + 1)
        end = shards.highest(jnp.max(jnp.where(real, index, 0), axis=-1, initial=0))
        return jnp.asarray(end - shards.count * rows, xp.int64)[..., None, None, None, None]

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
        shards, real = self.shards, self.key_mask
        if real is not None:
            real = jnp.moveaxis(shards.gathered(real), 0, -2)
            real = jnp.reshape(real, (*real.shape[:-2], -1))
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
            None,
        ).counts()
