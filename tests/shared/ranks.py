"""Processes of one group: `run` starts them, `joined` is how each of them joins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Ranks", "joined", "part", "run"]


class Ranks:
    """What a process group says of itself, for calls that are refused before ranks meet."""

    group_name = "two ranks"

    def size(self) -> int:
        """Return the number of ranks."""
        return 2

    def rank(self) -> int:
        """Return the rank of this process."""
        return 0


def run(module: str, folder: Path, count: int) -> list[Any]:
    """Run a module of tests/shared on so many ranks, and return what each has saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    file = Path(__file__).with_name(f"{module}.py")
    command = [sys.executable, "-W", "ignore", str(file), str(folder), str(count)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(r)], env=environment, **pipes) for r in range(count)]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count, "\n".join(said)[-6000:]
    return [torch.load(folder / f"rank_{rank}") for rank in range(count)]


def joined(compute: Any) -> None:
    """Save ``compute(group)`` on the rank that the command line names."""
    folder, count, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    torch.save(compute(dist.group.WORLD), folder / f"rank_{rank}")
    dist.destroy_process_group()


def part(x: Any, group: Any, axis: int) -> Any:
    """Return the share of a rank of an array along an axis."""
    return x.tensor_split(group.size(), axis)[group.rank()]
