"""Kernels that reduce over the rows of arrays (batch, heads, rows, columns), and their launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .programs import HALVES, read, scalar_of
from .runtime import BLOCKS, KernelCache, too_old

__all__ = ["KERNELS", "ColumnLaunch", "RowProgram", "instances", "limit"]

#: The threads of a block (THREADS of kernels/tiles.cuh), the most threads that share one row, the
#: rows that a thread holds in registers (RUN of kernels/columns.cuh), and the columns of one load
#: (WIDE of kernels/tiles.cuh).
THREADS, ROW_THREADS, RUN = 256, 32, 8
WIDE = {"float": 4, "double": 2}

_STATISTICS = ("statistics.cu",)
_PREFIXES = (*_STATISTICS, "prefixes.cu")
_POOLING = ("pooling.cu",)

#: The files of each kernel after kernels/columns.cuh, and its template argument: the class that
#: merges two states, or "T", the type of the rows that the kernel reads.
KERNELS = {
    "moments_of_chunks": (_STATISTICS, "T"),
    "moments_merged": (_STATISTICS, "Moments"),
    "moments_vjp": (_STATISTICS, "T"),
    "prefixes": (_PREFIXES, "T"),
    "levels_of_chunks": (_PREFIXES, "Totals"),
    "suffixes": (_PREFIXES, "Totals"),
    "prefixes_vjp": (_PREFIXES, "T"),
    "pooled": (_POOLING, "T"),
    "pooled_vjp": (_POOLING, "scalar"),
    "chunks_scanned<Moments>": ((), ""),
    "chunks_scanned<Totals>": ((), ""),
}


@dataclass(frozen=True)
class RowProgram:
    """The program of the kernels of columns; with the name of a kernel it gives the source.

    Attributes
    ----------
    scalar : {"float", "double"}
        The CUDA C++ type of sums and of results.
    """

    scalar: str

    def text(self, kernel: str) -> str:
        """Return the source of a kernel, by the name of a template instantiation."""
        entry = KERNELS.get(kernel) or KERNELS[kernel.partition("<")[0]]
        files = ("tiles.cuh", "columns.cuh", *entry[0])
        return "\n".join([read("ptx.cuh"), f"typedef {self.scalar} scalar;", *map(read, files)])


def instances(dtype: str) -> dict[str, str]:
    """Return the template instantiation of each kernel for rows of a dtype."""
    types = {"T": HALVES.get(dtype, "scalar")}
    return {
        kernel: f"{kernel}<{types.get(kind, kind)}>" if kind else kernel
        for kernel, (_, kind) in KERNELS.items()
    }


def limit(shape: tuple[int, ...], capability: int) -> str:
    """Return why no kernel takes an array (*B, H, M, D) on a device; empty if one does."""
    *lead, rows, columns = shape
    if why := too_old(capability):
        return why
    if not columns:
        return "got D = 0, and a kernel takes one feature at least"
    # A kernel has at most one block for each row, and one for each head if there are no rows.
    width = ROW_THREADS * WIDE["double"]
    if math.prod(lead) * max(rows, 1) > BLOCKS[0] or -(-columns // width) > BLOCKS[1]:
        return (
            f"got {shape}, and a grid has {BLOCKS[0]} by {BLOCKS[1]} blocks at most, of one "
            f"row at least and {width} columns"
        )
    return ""


class ColumnLaunch:
    """Launches of the kernels on arrays of one dtype and one number of columns.

    Parameters
    ----------
    cache : KernelCache
    dtype : str
        The dtype of the rows that the kernels read.
    columns : int
    xp : namespace
    """

    def __init__(self, cache: KernelCache, dtype: str, columns: int, xp: Any) -> None:
        scalar = scalar_of("float64" if dtype == "float64" else "float32")
        self.cache, self.columns = cache, columns
        self.program, self.names = RowProgram(scalar), instances(dtype)
        self.dtype = xp.float32 if scalar == "float" else xp.float64
        loads = -(-columns // WIDE[scalar])
        self.bits = min((loads - 1).bit_length(), ROW_THREADS.bit_length() - 1)
        self.slices = -(-loads >> self.bits)
        self.lanes = THREADS >> self.bits
        self.tile = self.lanes * RUN

    def empty(self, *shape: int) -> Any:
        """Allocate an array for a result."""
        return self.cache.runtime.empty(shape, self.dtype)

    def run(self, name: str, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel with `blocks` blocks of rows, unless the grid is empty."""
        if blocks and self.slices:
            kernel = self.cache.kernel(self.program, self.names[name])
            kernel((blocks, self.slices), (THREADS,), arguments)
