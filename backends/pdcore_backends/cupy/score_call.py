"""The launches of a contraction by scores, and of its pullback, on the arrays of one call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pdcore.extend import Operands, Scores, dtype_name, sum_to

from .operands import NULL, packed
from .programs import Program, columns_for, memory, tile
from .runtime import KernelCache

__all__ = ["THREADS", "ScoreCall"]

#: Threads of a block, THREADS of kernels/tiles.cuh.
THREADS = 256


class ScoreCall:
    """The launches of one contraction by scores."""

    def __init__(self, cache: KernelCache, c: Scores, o: Operands, xp: Any) -> None:
        self.cache, self.c, self.o, self.xp = cache, c, o, xp
        entries = () if c.expression is None else c.expression.entries
        names = () if c.expression is None else tuple(o.values)
        tables = {entry.table for entry in entries}
        self.names = tuple(name for name in names if name not in tables)
        shapes = {name: o.values[name].shape[-2:] for name in names if name in tables}
        self.tables = tuple((name, int(n), int(m)) for name, (n, m) in shapes.items())
        self.read = {"q": o.q, "k": o.k, "v": o.v} | ({} if o.bias is None else {"bias": o.bias})
        self.scalar = self.program().scalar
        self.dtype = xp.float64 if self.scalar == "double" else xp.float32
        self.packed = packed(c, o, self.names, self.tables, xp=xp)

    def program(self, **more: Any) -> Program:
        """Return the program for the dtypes of the operands and of the arrays in `more`."""
        dtypes = {n: dtype_name(x) for n, x in {**self.read, **more}.items()}
        dropped = self.o.dropout is not None
        return Program.of(self.c, self.names, dtypes, self.tables, dropout=dropped)

    def result(self, *shape: int, dtype: Any = None) -> Any:
        """Allocate an array for a result, in the dtype of sums by default."""
        return self.cache.runtime.empty(shape, self.dtype if dtype is None else dtype)

    def tiles(self, count: int) -> int:
        """Count the tiles along an axis."""
        return -(-count // tile(self.scalar))

    def columns(self, width: int) -> int:
        """Choose the columns of a block, for a result of `width` columns."""
        return columns_for(width)

    def arguments(self, *more: Any) -> tuple[Any, ...]:
        """Return the arguments of a kernel: operands, `more` and shape."""
        return (*self.packed.arrays, *more, self.packed.shape)

    def tiled(
        self,
        name: str,
        count: int,
        heads: int,
        width: int,
        more: tuple[Any, ...],
        flags: str = "",
        **stored: Any,
    ) -> None:
        """Launch a kernel for `count` rows or keys of `heads` heads, and `width` columns."""
        columns = self.columns(width)
        # A result without columns still takes a block, which writes the other results.
        grid = (self.tiles(count) * heads, max(1, -(-width // columns)))
        shared = memory(self.scalar, columns)
        self.start(f"{name}<{columns}{flags}>", grid, self.arguments(*more), shared, **stored)

    def start(
        self,
        name: str,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared: int = 0,
        **stored: Any,
    ) -> None:
        """Launch a kernel, unless the grid is empty."""
        if all(grid):
            kernel = self.cache.kernel(self.program(**stored), name)
            kernel(grid, (THREADS,), arguments, shared_mem=shared)

    def delta(self, out: Any, level: Any, d_out: Any, d_level: Any) -> Any:
        """Compute d_out . out - d_L of each row, see `score_contraction.row_delta`."""
        delta = self.result(*level.shape)
        rows = math.prod(level.shape)
        if rows:
            dtypes = {"out": dtype_name(out), "d_out": dtype_name(d_out)}
            kernel = self.cache.kernel(Program.of(Scores(), (), dtypes), "scores_delta")
            arguments = (out, d_out, level, d_level, delta, np.int64(rows), np.int32(out.shape[-1]))
            kernel((-(-rows // (THREADS // 32)),), (THREADS,), arguments, shared_mem=0)
        return delta

    def of_rows(self, cotangents: tuple[Any, ...]) -> dict[str, Any]:
        """Compute the gradients of the queries and of the scalars of log kappa."""
        x, o, xp, names = self.packed, self.o, self.xp, self.names
        dq = self.result(*o.q.shape, dtype=o.q.dtype)
        heads, tiles = x.batch * x.heads * x.group, self.tiles(x.rows)
        sums = self.result(heads, tiles, len(names)) if names else NULL
        self.tiled(
            "scores_rows", x.rows, heads, x.dim, (*cotangents, dq, sums), d_out=cotangents[0]
        )
        grads = {n: xp.zeros_like(value) for n, value in o.values.items()}
        if names:
            parts = xp.reshape(sums, (x.batch, x.heads, x.group, tiles, len(names)))
            parts = xp.sum(parts, axis=(0, 3))
            for i, name in enumerate(names):
                part = parts[..., i][..., None, None]
                grads[name] = sum_to(part, grads[name].shape, xp=xp)
        return grads | {"q": dq}

    def of_keys(self, cotangents: tuple[Any, ...]) -> dict[str, Any]:
        """Compute the gradients of keys, values and key bias."""
        x, o = self.packed, self.o
        grads = {n: self.result(*y.shape, dtype=y.dtype) for n, y in (("k", o.k), ("v", o.v))}
        if o.key_bias is not None:
            grads["key_bias"] = self.result(*o.key_bias.shape)
        heads = x.batch * x.heads
        arguments = (*cotangents, grads["k"], grads.get("key_bias", NULL))
        self.tiled("scores_keys", x.keys, heads, x.dim, arguments, ", false", d_out=cotangents[0])
        if x.value_dim:
            self.tiled(
                "scores_keys",
                x.keys,
                heads,
                x.value_dim,
                (*cotangents, grads["v"], NULL),
                ", true",
                d_out=cotangents[0],
            )
        return grads

    def of_bias(self, cotangents: tuple[Any, ...]) -> Any:
        """Compute the gradient of the bias."""
        batch, heads, group, rows, keys = extent = self.packed.bias_extent
        shape = self.o.bias.shape
        whole = math.prod(shape) == math.prod(extent)
        result = self.result(*extent, dtype=self.o.bias.dtype if whole else None)
        planes = batch * heads * group
        grid = (planes * self.tiles(rows) * self.tiles(keys),)
        self.start(
            "scores_bias",
            grid,
            self.arguments(*cotangents, result),
            memory(self.scalar, 32),
            d_out=cotangents[0],
            d_bias=result,
        )
        lead = self.o.q.shape[:-4] if batch != 1 else (1,) * (len(shape) - 4)
        return sum_to(self.xp.reshape(result, (*lead, *extent[1:])), shape, xp=self.xp)
