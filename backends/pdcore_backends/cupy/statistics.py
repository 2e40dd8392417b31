"""Moments of the keys and their pullbacks, by CUDA kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pdcore.extend import KeySet, Mean, Moments, Plan, Request, Summary, dtype_name

from .columns import ColumnLaunch, limit
from .operands import NULL, in_rows, one_lead, record, strides_of
from .runtime import KernelCache

__all__ = ["KERNELS", "MomentKernels", "summarised"]

#: The value of `Summary.choice` where the kernels compute the statistics.
KERNELS = "kernels"

#: Rows of a chunk; with longer chunks too few blocks would run at once.
CHUNK = 512

#: `Layout` of kernels/statistics.cu, member by member.
LAYOUT = np.dtype(
    [
        ("keys", np.int64, 3),
        *(
            (n, np.int32)
            for n in ("batch", "heads", "rows", "columns", "chunks", "tiles", "shared", "bits")
        ),
    ],
    align=True,
)


def summarised(plan: Plan, request: Request, capability: int, library: str) -> Plan:
    """Choose the kernels for the statistics of a plan if they can compute them."""
    summary = plan.summary
    if summary is None or type(summary.statistics) is KeySet:  # the state is the keys themselves
        return plan
    why = _unfit(summary, request, capability)
    if why:
        return replace(plan, steps=(*plan.steps, f"statistics: {library}'s own operations: {why}"))
    method = (
        "a scan of chunks in three passes"
        if summary.scope == "prefix"
        else "chunks, each key read once, merged in a fixed order"
    )
    step = f"statistics: kernels, by {method}, in {plan.accumulate}"
    if request.dtype != plan.accumulate and all(group.scale == 1 for group in plan.groups):
        step += f", of keys in {request.dtype}"
    return replace(plan, summary=replace(summary, choice=KERNELS), steps=(*plan.steps, step))


def _unfit(summary: Summary, request: Request, capability: int) -> str:
    kind = type(summary.statistics)
    if kind not in (Mean, Moments):
        return f"no kernel computes {kind.__name__}"
    why = limit(request.k, capability)
    if summary.scope == "prefix" and not why:  # the pullback scans the rows of the queries too
        why = limit((*request.k[:-2], *request.q[-2:]), capability)
    return why


class MomentKernels:
    """The states of `Moments`, `Mean` and `prefix_states`, by the kernels of one runtime."""

    def __init__(self, cache: KernelCache) -> None:
        self.cache = cache

    def moments(self, keys: Any, mask: Any, *, shared: bool, xp: Any) -> dict[str, Any]:
        """Compute the finalised state of the keys, see `Statistics.of` and `Statistics.finalize`.

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
            n (*B, H, 1, 1), mean and var (*B, H, 1, D); with `shared` every axis of B has
            length 1.
        """
        with self.cache.runtime.on(keys):
            call = _MomentCall(self.cache, keys, mask, xp)
            chunks = call.long_chunks
            layout = call.layout(chunks, call.tiles, shared)
            states = call.states(chunks)
            call.run("moments_of_chunks", chunks, (*call.arrays, *states, layout))
            count = call.heads if shared else call.batch * call.heads
            results = call.results(count)
            call.launch.run("moments_merged", count, (*states, *results, layout))
        lead = (1,) * len(call.lead) if shared else call.lead
        return call.named(results, (*lead, call.heads, 1), xp)

    def vjp(
        self,
        keys: Any,
        mask: Any,
        final: Mapping[str, Any],
        cotangent: Mapping[str, Any],
        *,
        xp: Any,
    ) -> Any:
        """Compute the gradient of the keys, see `Moments.vjp`."""
        with self.cache.runtime.on(keys):
            call = _MomentCall(self.cache, keys, mask, xp)
            chunks = call.long_chunks
            shared = math.prod(final["mean"].shape[:-3]) == 1
            state = tuple(xp.ascontiguousarray(final[n]) for n in ("n", "mean"))
            cotangents = tuple(
                xp.ascontiguousarray(cotangent[n]) if n in cotangent else NULL
                for n in ("mean", "var")
            )
            gradient = call.launch.empty(*keys.shape)
            layout = call.layout(chunks, call.tiles, shared)
            call.run("moments_vjp", chunks, (*call.arrays, *state, *cotangents, gradient, layout))
        return gradient

    def prefixes(self, keys: Any, mask: Any, *, xp: Any) -> dict[str, Any]:
        """Compute the finalised state of every prefix, (*B, H, M + 1, D), see `prefix_states`."""
        with self.cache.runtime.on(keys):
            call = _MomentCall(self.cache, keys, mask, xp)
            chunks = call.chunks
            layout = call.layout(chunks)
            states = call.states(chunks)
            call.run("moments_of_chunks", chunks, (*call.arrays, *states, layout))
            before = call.scanned("Moments", chunks, states)
            results = call.results(call.batch * call.heads * (call.rows + 1))
            call.run("prefixes", chunks, (*call.arrays, *before, *results, layout))
        return call.named(results, (*call.lead, call.heads, call.rows + 1), xp)

    def prefix_vjp(
        self,
        keys: Any,
        mask: Any,
        rows: Mapping[str, Any],
        cotangent: Mapping[str, Any],
        later: Any,
        *,
        xp: Any,
    ) -> Any:
        """Compute the gradient of the keys, see `Moments.prefix_vjp`."""
        with self.cache.runtime.on(keys):
            call = _MomentCall(self.cache, keys, mask, xp)
            queries = _MomentCall(self.cache, rows["mean"], None, xp)
            first = _first_row_with_key(rows["n"], xp)
            d_var = cotangent.get("var")
            d_var = xp.zeros_like(cotangent["mean"]) if d_var is None else d_var
            row_arrays = (
                *map(
                    xp.ascontiguousarray,
                    (rows["n"], rows["mean"], cotangent["mean"], d_var),
                ),
                first,
            )
            chunks = queries.chunks
            layout = queries.layout(chunks)
            sums = queries.states(chunks)
            queries.run("levels_of_chunks", chunks, (*row_arrays, *sums, layout))
            before = queries.scanned("Totals", chunks, sums)
            shape = (*rows["mean"].shape[:-2], queries.rows + 1, keys.shape[-1])
            level, slope = call.launch.empty(*shape), call.launch.empty(*shape)
            queries.run("suffixes", chunks, (*row_arrays, *before, level, slope, layout))
            # `later` is (M, 1) for all sequences, or (*B, 1, 1, M, 1).
            stride = 0 if math.prod(later.shape) == call.rows else call.rows
            gradient = call.launch.empty(*keys.shape)
            call.run(
                "prefixes_vjp",
                call.chunks,
                (
                    *call.arrays,
                    row_arrays[1],
                    first,
                    level,
                    slope,
                    xp.ascontiguousarray(later),
                    np.int64(stride),
                    gradient,
                    layout,
                    call.layout(call.chunks),
                ),
            )
        return gradient


class _MomentCall:
    """The launches on keys, or on the means of rows, which have the same layout."""

    def __init__(self, cache: KernelCache, keys: Any, mask: Any, xp: Any) -> None:
        *lead, self.heads, self.rows, columns = keys.shape
        self.lead, self.batch = tuple(lead), math.prod(lead)
        if mask is not None:
            mask = xp.ascontiguousarray(xp.reshape(mask, (self.batch, self.rows)))
        keys = in_rows(one_lead(keys, lead, xp), xp)
        self.strides = strides_of(keys)[:-1]
        self.arrays = (keys, NULL if mask is None else mask)
        self.launch = ColumnLaunch(cache, dtype_name(keys), columns, xp)

    @property
    def tiles(self) -> int:
        """The tiles of a long chunk."""
        return max(1, CHUNK // int(self.launch.tile))

    @property
    def long_chunks(self) -> int:
        """The chunks of a head with `tiles` tiles each; their states are merged, not scanned."""
        return -(-int(self.rows) // (self.launch.tile * self.tiles))

    @property
    def chunks(self) -> int:
        """The chunks of a head with one tile each; at least one, which writes the empty prefix."""
        return max(1, -(-int(self.rows) // self.launch.tile))

    def run(self, name: str, chunks: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel for `chunks` chunks of every head."""
        self.launch.run(name, self.batch * self.heads * chunks, arguments)

    def layout(self, chunks: int, tiles: int = 1, shared: bool = False) -> Any:
        """Build a `LAYOUT`, which is passed by value."""
        return record(
            LAYOUT,
            {
                "keys": self.strides,
                "batch": self.batch,
                "heads": self.heads,
                "rows": self.rows,
                "columns": self.launch.columns,
                "chunks": chunks,
                "tiles": tiles,
                "shared": shared,
                "bits": self.launch.bits,
            },
        )

    def states(self, chunks: int) -> tuple[Any, Any]:
        """Allocate states of chunks, `States` of kernels/columns.cuh."""
        count, launch = self.batch * self.heads * chunks, self.launch
        return launch.empty(launch.slices, count), launch.empty(3, count, launch.columns)

    def scanned(self, kind: str, chunks: int, states: tuple[Any, Any]) -> tuple[Any, Any]:
        """Compute the states before each chunk of a head; the class `kind` merges states."""
        n, sums = states
        before, launch = self.launch.empty(*n.shape), self.launch
        sizes = map(np.int32, (chunks, launch.columns, launch.bits))
        self.run(f"chunks_scanned<{kind}>", 1, (n, sums, before, *sizes))
        return before, sums

    def results(self, count: int) -> tuple[Any, Any, Any]:
        """Allocate the n, mean and var of `count` finalised states."""
        launch = self.launch
        shape = (count, launch.columns)
        return launch.empty(count), launch.empty(*shape), launch.empty(*shape)

    def named(
        self, results: tuple[Any, Any, Any], shape: tuple[int, ...], xp: Any
    ) -> dict[str, Any]:
        """Return finalised states by name, with their leading axes."""
        widths = (1, self.launch.columns, self.launch.columns)
        return {
            n: xp.reshape(x, (*shape, w))
            for n, x, w in zip(("n", "mean", "var"), results, widths, strict=True)
        }


def _first_row_with_key(n: Any, xp: Any) -> Any:
    """Return the first row of each sequence whose prefix has a key, (*B,); 0 if none has.

    All heads have the same keys.
    """
    counts = n[..., 0, :, 0] > 0
    if not counts.shape[-1]:
        # An array also for a single sequence, where NumPy would sum to a scalar.
        return xp.zeros(counts.shape[:-1], dtype=xp.int64)
    return xp.ascontiguousarray(xp.argmax(counts, axis=-1))
