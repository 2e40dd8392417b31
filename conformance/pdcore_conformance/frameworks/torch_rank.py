"""One rank of `TorchFramework.shard`: computes its part of a call, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import pdcore

__all__ = ["main"]


def main(folder: str, count: int, rank: int) -> None:
    """Compute the part of this rank of the call in a folder, and put the result there."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    name, spec, q, k, v = torch.load(Path(folder, "call"))
    own = (x.tensor_split(count, -2)[rank].contiguous() for x in (q, k, v))
    result = pdcore.attention(*own, spec, group=dist.new_group(), backend=name, return_lse=True)
    torch.save(tuple(x.clone() for x in result), Path(folder, f"rank_{rank}"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
