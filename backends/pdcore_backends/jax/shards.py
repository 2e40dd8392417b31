"""How the shards of a sequence along a mapped axis exchange arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jax import lax

from pdcore.extend import Shards

from .namespace import NAMESPACE

__all__ = ["MappedShards"]


@dataclass(frozen=True)
class MappedShards(Shards):
    """The shards of a sequence along an axis of `jax.shard_map` or `jax.vmap`.

    Attributes
    ----------
    axis : str
        The name of the mapped axis.
    count : int
        The number of shards, P.
    """

    axis: str
    count: int
    xp: ClassVar[Any] = NAMESPACE

    @classmethod
    def along(cls, axis: str) -> MappedShards:
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
        """The index r of this shard, traced."""
        return lax.axis_index(self.axis)

    def sent(self, x: Any, by: int) -> Any:
        """Return the pytree `x` of the shard `by` places before."""
        ranks = range(self.count)
        return lax.ppermute(x, self.axis, [(r, (r + by) % self.count) for r in ranks])

    def gathered(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arrays of all shards, see `Shards.gathered`."""
        gathered: dict[str, Any] = lax.all_gather(dict(arrays), self.axis)
        return gathered

    def added(self, x: Any) -> Any:
        """Return the sum over the shards."""
        return lax.psum(x, self.axis)

    def highest(self, x: Any) -> Any:
        """Return the maximum over the shards, without a gradient."""
        return lax.pmax(lax.stop_gradient(x), self.axis)
