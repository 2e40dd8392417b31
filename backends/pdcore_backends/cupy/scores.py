"""The contraction by scores and its pullback, by CUDA kernels of our own."""

from __future__ import annotations

from typing import Any

from pdcore.arrays import dtype_name
from pdcore.operands import Operands
from pdcore.plan import Scores
from pdcore.score_contraction import row_delta
from pdcore.transform import sum_to

from .operands import NULL, packed
from .programs import Program, columns_for, memory, tile
from .runtime import KernelCache

__all__ = ["ScoreKernels"]

#: Of a block, THREADS of kernels/tiles.cuh.
THREADS = 256


class ScoreKernels:
    """The contraction by the kernels of one runtime."""

    def __init__(self, cache: KernelCache) -> None:
        self.cache, self.runtime = cache, cache.runtime

    def forward(self, c: Scores, o: Operands, *, xp: Any) -> tuple[Any, Any]:
        """Contract, see `pdcore.score_contraction.scores`."""
        with self.runtime.on(o.q):
            call = _Call(self, c, o, xp)
            out = call.result(*o.q.shape[:-1], o.v.shape[-1])
            level = call.result(*o.q.shape[:-1])
            x = call.packed
            call.launch("scores_forward", x.rows, x.batch * x.heads * x.group, x.value_dim,
                        (out, level))  # fmt: skip
        return out, level

    def pullback(self, c: Scores, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any,
                 *, xp: Any) -> dict[str, Any]:  # fmt: skip
        """Pull back, see `pdcore.score_contraction.scores_vjp`."""
        delta = xp.zeros_like(level) if c.signed else \
            row_delta(out, level, d_out, d_level, xp=xp)[..., 0]  # fmt: skip
        with self.runtime.on(o.q):
            call = _Call(self, c, o, xp)
            given = tuple(map(xp.ascontiguousarray, (d_out, level, delta)))
            grads = call.of_rows(given) | call.of_keys(given)
            if o.bias is not None:
                grads["bias"] = call.of_bias(given)
        return grads


class _Call:
    """The launches of one contraction."""

    def __init__(self, kernels: ScoreKernels, c: Scores, o: Operands, xp: Any) -> None:
        self.kernels, self.o, self.xp = kernels, o, xp
        names = () if c.expression is None else tuple(o.values)
        self.program = Program.of(c, names, dtype_name(o.q))
        self.packed = packed(c, o, names, xp=xp)

    def result(self, *shape: int) -> Any:
        """Allocate a result, which a kernel fills."""
        return self.kernels.runtime.empty(shape, self.o.q.dtype)

    def tiles(self, count: int) -> int:
        """Count the tiles along an axis."""
        return -(-count // tile(self.program.scalar))

    def launch(self, name: str, count: int, heads: int, width: int, results: tuple[Any, ...],
               given: tuple[Any, ...] = (), flags: str = "") -> None:  # fmt: skip
        """Launch a kernel for `count` rows or keys of `heads` heads, and results of `width`."""
        columns = columns_for(width)
        # Results without columns have others beside them.
        grid = (self.tiles(count) * heads, max(1, -(-width // columns)))
        self.run(f"{name}<{columns}{flags}>", grid, columns, given + results)

    def run(self, name: str, grid: tuple[int, ...], columns: int, more: tuple[Any, ...]) -> None:
        """Launch a kernel unless there is nothing to do."""
        if not all(grid):
            return
        kernel = self.kernels.cache.kernel(self.program, name)
        arguments = (*self.packed.arrays, *more, self.packed.shape)
        kernel(grid, (THREADS,), arguments, shared_mem=memory(self.program.scalar, columns))

    def of_rows(self, given: tuple[Any, ...]) -> dict[str, Any]:
        """Give the cotangents of the queries, and of the scalars of log kappa."""
        x, o, xp = self.packed, self.o, self.xp
        names = self.program.values
        dq = self.result(*o.q.shape)
        heads, tiles = x.batch * x.heads * x.group, self.tiles(x.rows)
        sums = self.result(heads, tiles, len(names)) if names else NULL
        self.launch("scores_rows", x.rows, heads, x.dim, (dq, sums), given)
        grads = {n: xp.zeros_like(value) for n, value in o.values.items()}
        if names:
            parts = xp.reshape(sums, (x.batch, x.heads, x.group * tiles, len(names)))
            parts = xp.sum(parts, axis=(0, 2))
            grads |= {n: xp.reshape(parts[:, i], grads[n].shape) for i, n in enumerate(names)}
        return grads | {"q": dq}

    def of_keys(self, given: tuple[Any, ...]) -> dict[str, Any]:
        """Give the cotangents of keys, values and key bias."""
        x, o = self.packed, self.o
        grads = {"k": self.result(*o.k.shape), "v": self.result(*o.v.shape)}
        if o.key_bias is not None:
            grads["key_bias"] = self.result(*o.key_bias.shape)
        heads = x.batch * x.heads
        self.launch("scores_keys", x.keys, heads, x.dim, (grads["k"], grads.get("key_bias", NULL)),
                    given, ", false")  # fmt: skip
        if x.value_dim:
            self.launch("scores_keys", x.keys, heads, x.value_dim, (grads["v"], NULL), given,
                        ", true")  # fmt: skip
        return grads

    def of_bias(self, given: tuple[Any, ...]) -> Any:
        """Give the cotangent of the bias."""
        batch, heads, group, rows, keys = extent = self.packed.bias_extent
        found = self.result(*extent)
        planes = batch * heads * group
        grid = (planes * self.tiles(rows) * self.tiles(keys),)
        self.run("scores_bias", grid, 32, (*given, found))
        own = self.o.bias.shape
        lead = self.o.q.shape[:-4] if batch != 1 else (1,) * (len(own) - 4)
        return sum_to(self.xp.reshape(found, (*lead, *extent[1:])), own, xp=self.xp)
