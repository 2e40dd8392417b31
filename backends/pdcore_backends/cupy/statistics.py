"""Moments of the keys and their pullbacks, by CUDA kernels of our own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pdcore.arrays import dtype_name
from pdcore.backend import Request
from pdcore.plan import Plan, Summary
from pdcore.statistics import Moments

from .columns import ColumnLaunch, limit
from .operands import NULL, in_rows, one_lead, record, strides_of
from .runtime import KernelCache

__all__ = ["CompiledSummary", "MomentKernels", "summarised"]

#: Rows of a chunk whose state is merged with others: more of them, and few blocks run at once.
CHUNK = 512

#: `Layout` of kernels/statistics.cu, member by member.
LAYOUT = np.dtype(
    [
        ("keys", np.int64, 3),
        *((n, np.int32) for n in ("batch", "heads", "rows", "columns", "chunks", "tiles",
                                  "shared", "bits")),
    ],
    align=True,
)  # fmt: skip


@dataclass(frozen=True)
class CompiledSummary(Summary):
    """Moments that the kernels compute."""


def summarised(plan: Plan, request: Request, capability: int, library: str) -> Plan:
    """Choose the kernels for the statistics of a plan where they compute them."""
    summary = plan.summary
    if summary is None:
        return plan
    kind = type(summary.statistics)
    why = limit(request.k, capability) if kind is Moments else \
        f"no kernel computes {kind.__name__}"  # fmt: skip
    if why:
        return replace(plan, steps=(*plan.steps, f"statistics: {library}'s own operations: {why}"))
    how = "a scan of chunks in three passes" if summary.scope == "prefix" else \
        "chunks, each key read once, merged in a fixed order"  # fmt: skip
    step = f"statistics: kernels, by {how}, in {plan.accumulate}"
    chosen = CompiledSummary(summary.statistics, summary.scope)
    return replace(plan, summary=chosen, steps=(*plan.steps, step))


class MomentKernels:
    """What `pdcore.statistics.Moments` and `prefix_states` give, by the kernels of one runtime."""

    def __init__(self, cache: KernelCache) -> None:
        self.cache = cache

    def moments(self, keys: Any, mask: Any, *, shared: bool, xp: Any) -> dict[str, Any]:
        """Give the finalised state of the keys, see `Statistics.of` and `Statistics.finalize`.

        Parameters
        ----------
        keys : array (*B, H, M, D)
            In any floating dtype.
        mask : bool array (*B, 1, M, 1) or None
        shared : bool
            Whether all sequences have one state.
        xp : namespace

        Returns
        -------
        mapping
            n (*B, H, 1, 1), mean and var (*B, H, 1, D), of 1s for B with `shared`.
        """
        with self.cache.runtime.on(keys):
            call = _Keys(self.cache, keys, mask, xp)
            heads, tiles = call.batch * call.heads, call.tiles
            chunks = -(-call.rows // (call.launch.tile * tiles))
            layout = call.layout(chunks, tiles, shared)
            states = call.states(heads * chunks)
            call.launch.run("moments_of_chunks", heads * chunks, (*call.arrays, NULL, *states,
                                                                  layout))  # fmt: skip
            count = call.heads if shared else heads
            found = call.results(count)
            call.launch.run("moments_merged", count, (*states, *found, layout))
        lead = (1,) * len(call.lead) if shared else call.lead
        return call.named(found, (*lead, call.heads, 1), xp)

    def vjp(self, keys: Any, mask: Any, final: Mapping[str, Any], cotangent: Mapping[str, Any],
            *, xp: Any) -> Any:  # fmt: skip
        """Pull back, see `Moments.vjp`."""
        with self.cache.runtime.on(keys):
            call = _Keys(self.cache, keys, mask, xp)
            heads, tiles = call.batch * call.heads, call.tiles
            chunks = -(-call.rows // (call.launch.tile * tiles))
            shared = math.prod(final["mean"].shape[:-3]) == 1
            state = tuple(xp.ascontiguousarray(final[n]) for n in ("n", "mean"))
            given = tuple(
                xp.ascontiguousarray(cotangent[n]) if n in cotangent else NULL
                for n in ("mean", "var")
            )
            found = call.launch.empty(*keys.shape)
            call.launch.run("moments_vjp", heads * chunks, (*call.arrays, NULL, *state, *given,
                            found, call.layout(chunks, tiles, shared)))  # fmt: skip
        return found

    def prefixes(self, keys: Any, mask: Any, *, xp: Any) -> dict[str, Any]:
        """Give the finalised state of every prefix, (*B, H, M + 1, D), see `prefix_states`."""
        with self.cache.runtime.on(keys):
            call = _Keys(self.cache, keys, mask, xp)
            first = call.first_real(xp)
            heads, chunks = call.batch * call.heads, call.chunks
            layout = call.layout(chunks)
            states = call.states(heads * chunks)
            given = (*call.arrays, first)
            call.launch.run("moments_of_chunks", heads * chunks, (*given, *states, layout))
            before = call.launch.scanned("Moments", heads, chunks, states)
            found = call.results(heads * (call.rows + 1))
            call.launch.run("prefixes", heads * chunks, (*given, *before, *found, layout))
        return call.named(found, (*call.lead, call.heads, call.rows + 1), xp)

    def prefix_vjp(self, keys: Any, mask: Any, rows: Mapping[str, Any],
                   cotangent: Mapping[str, Any], later: Any, *, xp: Any) -> Any:  # fmt: skip
        """Pull back, see `Moments.prefix_vjp`."""
        with self.cache.runtime.on(keys):
            call = _Keys(self.cache, keys, mask, xp)
            of_rows = _Keys(self.cache, rows["mean"], None, xp)
            heads, chunks = call.batch * call.heads, of_rows.chunks
            n, mean, d_mean, d_var = map(xp.ascontiguousarray, (
                rows["n"], rows["mean"], cotangent["mean"], cotangent["var"]))  # fmt: skip
            counted = xp.reshape(n, (call.batch, call.heads, of_rows.rows))[:, :1, :] > 0
            first = _first(counted[:, 0, :], xp)
            layout = of_rows.layout(chunks)
            given = (n, mean, d_mean, d_var, first)
            sums = of_rows.states(heads * chunks)
            launch = of_rows.launch
            launch.run("levels_of_chunks", heads * chunks, (*given, *sums, layout))
            before = launch.scanned("Totals", heads, chunks, sums)
            shape = (heads, of_rows.rows + 1, launch.columns)
            level, slope = launch.empty(*shape), launch.empty(*shape)
            launch.run("suffixes", heads * chunks, (*given, *before, level, slope, layout))
            found = call.launch.empty(*keys.shape)
            if later.ndim == 2:
                later, by_sequence = xp.ascontiguousarray(later), 0
            else:
                later = xp.ascontiguousarray(one_lead(later, call.lead, xp))
                by_sequence = 0 if later.shape[0] == 1 else call.rows
            call.launch.run("prefixes_vjp", heads * call.chunks, (
                *call.arrays, mean, first, level, slope, later, np.int64(by_sequence), found,
                layout, call.layout(call.chunks)))  # fmt: skip
        return found


class _Keys:
    """Keys as the kernels read them."""

    def __init__(self, cache: KernelCache, keys: Any, mask: Any, xp: Any) -> None:
        *lead, self.heads, self.rows, columns = keys.shape
        self.lead, self.batch = tuple(lead), math.prod(lead)
        self.mask = None
        if mask is not None:
            self.mask = xp.ascontiguousarray(xp.reshape(mask, (self.batch, self.rows)))
        keys = in_rows(one_lead(keys, lead, xp), xp)
        self.strides = strides_of(keys)[:-1]
        self.arrays = (keys, NULL if self.mask is None else self.mask)
        self.launch = ColumnLaunch(cache, dtype_name(keys), columns, xp)

    @property
    def tiles(self) -> int:
        """The tiles of a chunk, where chunks are merged but not scanned."""
        return max(1, CHUNK // int(self.launch.tile))

    @property
    def chunks(self) -> int:
        """The chunks of a head, of one tile each; one at least, which writes what is of no row."""
        return max(1, -(-int(self.rows) // self.launch.tile))

    def layout(self, chunks: int, tiles: int = 1, shared: bool = False) -> Any:
        """Give a `LAYOUT`, which is passed by value."""
        return record(LAYOUT, {
            "keys": self.strides, "batch": self.batch, "heads": self.heads, "rows": self.rows,
            "columns": self.launch.columns, "chunks": chunks, "tiles": tiles, "shared": shared,
            "bits": self.launch.bits,
        })  # fmt: skip

    def states(self, count: int) -> tuple[Any, Any, Any]:
        """Allocate states of chunks: counts for each block beside, and two rows of columns."""
        launch = self.launch
        shape = (count, launch.columns)
        return launch.empty(launch.slices, count), launch.empty(*shape), launch.empty(*shape)

    def results(self, count: int) -> tuple[Any, Any, Any]:
        """Allocate finalised states: n, mean and var."""
        launch = self.launch
        shape = (count, launch.columns)
        return launch.empty(count), launch.empty(*shape), launch.empty(*shape)

    def named(self, found: tuple[Any, Any, Any], shape: tuple[int, ...], xp: Any) -> dict[str, Any]:
        """Give finalised states their names and axes."""
        widths = (1, self.launch.columns, self.launch.columns)
        return {n: xp.reshape(x, (*shape, w))
                for n, x, w in zip(("n", "mean", "var"), found, widths, strict=True)}  # fmt: skip

    def first_real(self, xp: Any) -> Any:
        """Give the row of each sequence's first real key, (batch,); 0 where there is none."""
        if self.mask is None:
            return xp.zeros((self.batch,), dtype=xp.int64)
        return _first(self.mask, xp)


def _first(true: Any, xp: Any) -> Any:
    """Give the column of the first True in each row; 0 where there is none."""
    if not true.shape[-1]:
        return xp.sum(xp.astype(true, xp.int64), axis=-1)
    return xp.ascontiguousarray(xp.argmax(true, axis=-1))
