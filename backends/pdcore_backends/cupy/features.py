"""The contraction by features and its pullback, by CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pdcore.extend import Features, Operands, Scores, dtype_name

from .feature_programs import FeatureProgram, columns_for
from .operands import NULL
from .programs import tile
from .runtime import KernelCache
from .score_call import THREADS, ScoreCall
from .scores import Compiled

__all__ = ["CompiledFeatures", "FeatureKernels", "state_blocks"]

#: Under causal a chunk has CHUNK rows or keys for each CHUNK features, so that the states of all
#: chunks take about as much memory as the values; it has at most LARGEST_CHUNK of them.
CHUNK, LARGEST_CHUNK = 64, 256
#: Without causal the keys of a head are cut into at most SPLITS chunks, of SMALLEST_SPLIT keys or
#: more.
SPLITS, SMALLEST_SPLIT = 64, 256

_CHUNKS = np.dtype([(n, np.int32) for n in ("key_size", "key_count", "row_size", "row_count")])


@dataclass(frozen=True)
class CompiledFeatures(Compiled):
    """The choice of the kernels for a contraction by features."""


class FeatureKernels:
    """The contraction by features, by the kernels of one runtime."""

    def __init__(self, cache: KernelCache) -> None:
        self.cache = cache

    def forward(self, c: Features, o: Operands, *, xp: Any) -> tuple[Any, Any]:
        """Contract by features, see `feature_contraction.features`; 16-bit arrays are not cast."""
        with self.cache.runtime.on(o.q):
            call = _FeatureCall(self.cache, c, o, xp)
            dtype = o.v.dtype if c.choice.rounds else call.dtype
            out = call.result(*o.q.shape[:-1], o.v.shape[-1], dtype=dtype)
            level = call.result(*o.q.shape[:-1])
            x, tops = call.packed, call.tops()
            arguments = (call.states(tops), tops, out, level)
            heads = x.batch * x.heads * x.group
            call.tiled("features_forward", x.rows, heads, x.value_dim, arguments, out=out)
        return out, level

    def pullback(
        self, c: Features, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any, *, xp: Any
    ) -> dict[str, Any]:
        """Compute the gradients, in the dtypes of the operands, see `features_vjp`."""
        with self.cache.runtime.on(o.q):
            call = _FeatureCall(self.cache, c, o, xp)
            x, tops = call.packed, call.tops()
            out, level, d_out, d_level = map(xp.ascontiguousarray, (out, level, d_out, d_level))
            delta = xp.zeros_like(level) if c.signed else call.delta(out, level, d_out, d_level)
            cotangents = (d_out, level, delta)
            grads = {
                n: call.result(*a.shape, dtype=a.dtype)
                for n, a in (("q", o.q), ("k", o.k), ("v", o.v))
            }
            heads, pairs = x.batch * x.heads * x.group, x.batch * x.heads
            seen = (*cotangents, call.states(tops), tops)
            call.tiled("features_rows", x.rows, heads, x.dim, (*seen, grads["q"]), d_out=d_out)
            seen = (*cotangents, call.states(tops, cotangents), tops)
            call.tiled(
                "features_keys", x.keys, pairs, x.dim, (*seen, grads["k"]), ", false", d_out=d_out
            )
            if x.value_dim:
                call.tiled(
                    "features_keys",
                    x.keys,
                    pairs,
                    x.value_dim,
                    (*seen, grads["v"]),
                    ", true",
                    d_out=d_out,
                )
        return grads


class _Chunks(NamedTuple):
    """The length and the number of the chunks along an axis."""

    size: int
    chunks: int


class _FeatureCall(ScoreCall):
    """The launches of one contraction by features."""

    def __init__(self, cache: KernelCache, c: Features, o: Operands, xp: Any) -> None:
        self.features = c
        super().__init__(cache, Scores("features", signed=c.signed), o, xp)
        x, causal = self.packed, o.visibility.support.ahead == 0
        self.keys, self.rows = (_chunks(n, x.dim, causal) for n in (x.keys, x.rows))
        self.cut = np.array((*self.keys, *self.rows), np.int32).view(_CHUNKS)[0]

    def program(self, **more: Any) -> FeatureProgram:
        """Return the program for the dtypes of the operands and of the arrays in `more`."""
        dtypes = {n: dtype_name(x) for n, x in {**self.read, **more}.items()}
        return FeatureProgram.of_features(self.features, dtypes)

    def tops(self) -> Any:
        """Compute the largest log features of the keys before each chunk, and of all keys."""
        x, count = self.packed, self.keys.chunks
        if not self.features.log:
            return NULL
        tops = self.result(x.batch * x.heads, count + 1, x.dim)
        blocks = x.batch * x.heads * count * -(-x.dim // 32)
        self.start("features_highest", (blocks,), self.arguments(tops))
        self.scan(2, tops, NULL, x.dim, x.dim, count)
        return tops

    def states(self, tops: Any, cotangents: tuple[Any, ...] = ()) -> Any:
        """Compute the state before each chunk of keys, and that of all keys.

        With cotangents the states are those of chunks of rows, counted from the last row.
        """
        x, cut = self.packed, self.rows if cotangents else self.keys
        numbers = x.dim * (x.value_dim + 1)
        wide = 2 if self.scalar == "double" else 4
        pitch = -(-numbers // wide) * wide
        states = self.result(x.batch * x.heads, cut.chunks + 1, pitch)
        blocks = x.batch * x.heads * cut.chunks
        blocks *= _tiles(x.dim, x.value_dim, tile(self.scalar))
        arguments = self.arguments(*(cotangents or 3 * (NULL,)), tops, states)
        name = f"features_states<{'true' if cotangents else 'false'}>"
        stored = {"d_out": cotangents[0]} if cotangents else {}
        self.start(name, (blocks,), arguments, **stored)
        relative = self.features.log and not cotangents
        self.scan(int(relative), states, tops, numbers, pitch, cut.chunks)
        return states

    def scan(self, kind: int, x: Any, tops: Any, width: int, pitch: int, count: int) -> None:
        """Scan sums or maxima over the chunks in place, see `features_scan`."""
        packed = self.packed
        blocks = packed.batch * packed.heads * -(-width // THREADS)
        sizes = (
            np.int64(width),
            np.int64(pitch),
            np.int32(count),
            np.int32(packed.dim),
            np.int32(packed.value_dim),
        )
        self.start(f"features_scan<{kind}>", (blocks,), (x, tops, *sizes))

    def columns(self, width: int) -> int:
        """Choose the columns of a block, for a result of `width` columns."""
        return columns_for(width)

    def arguments(self, *more: Any) -> tuple[Any, ...]:
        """Return the arguments of a kernel: operands, `more`, shape and chunks."""
        return (*super().arguments(*more), self.cut)


def _chunks(count: int, dim: int, causal: bool) -> _Chunks:
    if causal:
        size = min(-(-max(dim, 1) // CHUNK) * CHUNK, LARGEST_CHUNK)
    else:
        size = max(-(-count // (SPLITS * CHUNK)) * CHUNK, SMALLEST_SPLIT)
    return _Chunks(size, -(-count // size))


def _tiles(dim: int, value_dim: int, size: int) -> int:
    return -(-dim // size) * max(1, -(-value_dim // size))


def state_blocks(dim: int, value_dim: int, length: int, heads: int, size: int) -> int:
    """Compute an upper bound of the blocks of a launch for states, in tiles of `size`."""
    chunks, numbers = -(-length // CHUNK), dim * (value_dim + 1)
    return heads * max(chunks * _tiles(dim, value_dim, size), -(-numbers // THREADS))
