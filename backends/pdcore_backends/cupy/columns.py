"""Kernels down the rows of arrays (batch, heads, rows, columns): their text and launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .programs import columns_for, read, scalar_of
from .runtime import BLOCKS, KernelCache, too_old

__all__ = ["KERNELS", "WIDTHS", "ColumnLaunch", "RowProgram", "geometry", "limit"]

#: Columns of a block.
WIDTHS = (32, 64, 128)

#: Of a block, THREADS of kernels/tiles.cuh; RUN of kernels/columns.cuh.
THREADS, RUN = 256, 8

_MOMENTS, _PREFIXES = ("statistics.cu",), ("statistics.cu", "prefixes.cu")

#: The files of each kernel, after kernels/columns.cuh.
KERNELS = {
    "moments_of_chunks": _MOMENTS,
    "moments_merged": _MOMENTS,
    "moments_vjp": _MOMENTS,
    "chunks_scanned": (),
    "prefixes": _PREFIXES,
    "levels_of_chunks": _PREFIXES,
    "suffixes": _PREFIXES,
    "prefixes_vjp": _PREFIXES,
    "pooled": ("pooling.cu",),
    "pooled_vjp": ("pooling.cu",),
}
_STORED = {"float16": "ptx::f16", "bfloat16": "ptx::bf16"}


@dataclass(frozen=True)
class RowProgram:
    """What is compiled in; a program and a kernel's name say which kernel runs.

    Attributes
    ----------
    scalar : {"float", "double"}
        The type of sums and of results.
    stored : {"float16", "bfloat16"} or None
        The dtype of the rows that are read, where it is not that of sums.
    """

    scalar: str
    stored: str | None = None

    def text(self, kernel: str) -> str:
        """Give the source of a kernel, ``"moments_vjp<64>"`` with the name of an instantiation."""
        stored = "scalar" if self.stored is None else _STORED[self.stored]
        head = [f"typedef {self.scalar} scalar;"]
        if self.stored is not None:
            head.append(read("ptx.cuh"))
        head += [f"typedef {stored} stored;", f"#define HALVES {int(self.stored is not None)}"]
        files = ("tiles.cuh", "columns.cuh", *KERNELS[kernel.partition("<")[0]])
        return "\n".join([*head, *map(read, files)])


def geometry(scalar: str, width: int) -> tuple[int, int]:
    """Give the lanes of a block of `width` columns, and the rows of its tile; `Place` in CUDA."""
    lanes = THREADS // (width // (4 if scalar == "float" else 2))
    return lanes, lanes * RUN


def limit(shape: tuple[int, ...], capability: int) -> str:
    """Say why no kernel takes an array (*B, H, M, D) on a device, nothing if one does."""
    *lead, rows, columns = shape
    if why := too_old(capability):
        return why
    if not columns:
        return "got D = 0, and a kernel takes one feature at least"
    # No kernel has more blocks than rows, but for one a head where there are none.
    if math.prod(lead) * max(rows, 1) > BLOCKS[0] or -(-columns // WIDTHS[-1]) > BLOCKS[1]:
        return (f"got {shape}, and a grid has {BLOCKS[0]} by {BLOCKS[1]} blocks at most, of one "
                f"row at least and {WIDTHS[-1]} columns")  # fmt: skip
    return ""


class ColumnLaunch:
    """Launches on arrays of so many columns, of one dtype.

    Parameters
    ----------
    cache : KernelCache
    dtype : str
        The dtype of the rows that are read.
    columns : int
    xp : namespace
    """

    def __init__(self, cache: KernelCache, dtype: str, columns: int, xp: Any) -> None:
        scalar = scalar_of("float64" if dtype == "float64" else "float32")
        self.cache, self.columns = cache, columns
        self.program = RowProgram(scalar, dtype if dtype in _STORED else None)
        self.dtype = xp.float32 if scalar == "float" else xp.float64
        self.width = min(columns_for(columns), WIDTHS[-1])
        self.slices = -(-columns // self.width)
        self.lanes, self.tile = geometry(scalar, self.width)

    def empty(self, *shape: int) -> Any:
        """Allocate a result, which a kernel fills."""
        return self.cache.runtime.empty(shape, self.dtype)

    def run(self, name: str, blocks: int, arguments: tuple[Any, ...], flags: str = "") -> None:
        """Launch a kernel for so many blocks of rows, unless there are none."""
        if blocks:
            kernel = self.cache.kernel(self.program, f"{name}<{self.width}{flags}>")
            kernel((blocks, self.slices), (THREADS,), arguments)

    def scanned(self, kind: str, heads: int, chunks: int, states: tuple[Any, Any, Any]) -> Any:
        """Turn the states of each head's chunks into those of what comes before; `kind` merges."""
        n, a, b = states
        before = self.empty(*n.shape)
        sizes = np.int32(chunks), np.int32(self.columns)
        self.run("chunks_scanned", heads, (n, a, b, before, *sizes), f", {kind}")
        return before, a, b
