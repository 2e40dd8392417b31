"""How the ranks of a process group exchange the arrays of a sequence that is cut over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from pdcore.extend import Shards

from . import namespace

__all__ = ["RankedShards"]


class RankedShards(Shards):
    """The shards of a sequence over the ranks of a process group, in their order.

    Every rank makes the same calls in the same order, forward and backward. Gradients are those of
    the sum of the losses of all ranks.

    Parameters
    ----------
    group : ProcessGroup or DeviceMesh
        A mesh has one dimension.
    """

    xp: ClassVar[Any] = namespace

    def __init__(self, group: Any) -> None:
        self.group = group.get_group() if hasattr(group, "get_group") else group
        self.count = self.group.size()
        self._rank = int(self.group.rank())

    @property
    def rank(self) -> int:
        """The index r of this rank in the group."""
        return self._rank

    def gathered(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the arrays of all ranks by one collective, see `Shards.gathered`."""
        flat = [x.reshape(-1) for x in arrays.values()]
        rows = _Gathered.apply(torch.cat(flat), self)
        parts = rows.split([x.numel() for x in flat], dim=1)
        return {
            name: part.reshape(self.count, *x.shape)
            for (name, x), part in zip(arrays.items(), parts, strict=True)
        }

    def added(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        total: Tensor = _Added.apply(x, self)
        return total

    def highest(self, x: Tensor) -> Tensor:
        """Return the maximum over the ranks, without a gradient."""
        return self.reduced(x.detach(), dist.ReduceOp.MAX)

    def reduced(self, x: Tensor, how: Any) -> Tensor:
        """Reduce an array over the ranks."""
        result = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, how, group=self.group)
        return result

    def exchanged(
        self, to: int | None, sent: list[Tensor], source: int | None
    ) -> Callable[[], list[Tensor]]:
        """Send arrays to one rank, and receive arrays of the same shapes from another.

        Parameters
        ----------
        to, source : int or None
            Ranks in the group; None for no rank.
        sent : list of Tensor
            Contiguous arrays.

        Returns
        -------
        callable
            Waits for the exchange, which computation may overlap, and returns what was received.
        """
        received = [] if source is None else [torch.empty_like(x) for x in sent]
        steps = [] if to is None else [self._step(dist.isend, x, to) for x in sent]
        steps += [self._step(dist.irecv, x, source) for x in received]
        works = dist.batch_isend_irecv(steps) if steps else []

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return wait

    def _step(self, how: Any, x: Tensor, other: Any) -> Any:
        return dist.P2POp(how, x, group=self.group, group_peer=other)


class _Gathered(torch.autograd.Function):  # type: ignore[misc]
    """The arrays of all ranks; the gradient of one is the sum of those that the ranks hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: RankedShards) -> Tensor:
        ctx.shards = shards
        parts = [torch.empty_like(x) for _ in range(shards.count)]
        dist.all_gather(parts, x.contiguous(), group=shards.group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        return ctx.shards.added(d[0])[ctx.shards.rank], None


class _Added(torch.autograd.Function):  # type: ignore[misc]
    """The sum over the ranks, whose gradient is the sum of those that the ranks hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: RankedShards) -> Tensor:
        ctx.shards = shards
        return shards.reduced(x, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        return ctx.shards.added(d[0]), None
