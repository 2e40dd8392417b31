"""Blocks of scores as small tiles.

OpenBLAS runs a matrix product of up to 2^18 multiplications in the calling thread, and on recent
x86 processors with a kernel for small matrices that is faster than the one for large matrices. So
scores are computed in blocks, one for each thread, and a block as a batch of tiles of that size;
BLAS threads never compete with the workers. A block holds scores (P, G, gq, gk, tq, tk): P key
heads, G query heads for each, gq by gk tiles of tq rows and tk keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdcore.extend import Operands, Scores

from .threads import buffer, run

__all__ = ["PRODUCTS", "Block", "Layout", "Problem", "Rows"]

PRODUCTS = 2**18  # multiplications that OpenBLAS does not split between its threads
_ELEMENTS = 2**18  # scores of a block; with fewer, the interpreter's overhead shows
_KEYS = 512  # keys of a block


@dataclass(frozen=True)
class Rows:
    """The rows of one block: `tiles` tiles of `size` rows from `start`."""

    start: int
    tiles: int
    size: int

    @property
    def stop(self) -> int:
        """The row after the last."""
        return self.start + self.tiles * self.size


@dataclass(frozen=True)
class Layout:
    """The blocks into which a problem is cut.

    Attributes
    ----------
    heads : int
        Key heads of a block.
    rows, keys : tuple of Rows
        The blocks of queries and of keys.
    """

    heads: int
    rows: tuple[Rows, ...]
    keys: tuple[Rows, ...]


def cut(length: int, tile: int, block: int) -> tuple[Rows, ...]:
    """Cut a length into blocks of whole tiles and one short tile for the rest."""
    whole = length - length % tile
    step = max(tile, block - block % tile)
    parts = [Rows(a, min(step, whole - a) // tile, tile) for a in range(0, whole, step)]
    if length > whole:
        parts.append(Rows(whole, 1, length - whole))
    return tuple(parts)


class Problem:
    """The operands of a contraction, with leading axes and key heads on one axis, of length P.

    Attributes
    ----------
    q : array (P, G, N, D)
    k, v : arrays (P, M, D) and (P, M, Dv)
    k_turned : array (P, D, M)
        The keys transposed, times the scale where log kappa is linear in q.k (`scaled`).
    """

    def __init__(self, c: Scores, o: Operands) -> None:
        self.c, self.o = c, o
        self.lead = o.k.shape[:-2]
        count = math.prod(self.lead)
        self.q = o.q.reshape(count, *o.q.shape[-3:])
        self.k = o.k.reshape(count, *o.k.shape[-2:])
        self.v = o.v.reshape(count, *o.v.shape[-2:])
        self.dtype = o.q.dtype
        self.heads_per_batch = self.lead[-1] if self.lead else 1
        view = o.visibility
        batch = count // max(1, self.heads_per_batch)
        self.scaled = c.expression is None and c.weight == "log"
        self.k_turned = np.empty((count, self.k.shape[2], self.k.shape[1]), self.dtype)
        self.key_bias = None if o.key_bias is None else o.key_bias.reshape(count, view.keys)
        self.key_mask = None
        if view.key_mask is not None:
            self.key_mask = np.broadcast_to(view.key_mask, (*self.lead[:-1], 1, view.keys))
            self.key_mask = self.key_mask.reshape(batch, view.keys)
        self.offsets = None
        if not view.static:
            whole = (*self.lead[:-1], 1, 1, 1, 1)
            self.offsets = np.broadcast_to(view.offset, whole).reshape(batch)

    @property
    def count(self) -> int:
        """The number of key heads, P."""
        return int(self.q.shape[0])

    def turn(self, workers: int) -> None:
        """Fill `k_turned`.

        The kernels for small matrices read a transposed copy a third faster than a transposed
        view, and the copy takes in the scale of a linear log kappa.
        """
        scale = self.dtype.type(self.c.scale if self.scaled else 1)

        def turn(part: tuple[int, int]) -> None:
            at = slice(*part)
            np.multiply(self.k[at].swapaxes(-1, -2), scale, out=self.k_turned[at])

        step = max(1, -(-self.count // (4 * workers)))
        parts = [(a, min(a + step, self.count)) for a in range(0, self.count, step)]
        run(turn, parts, workers)

    def layout(self, *, blocks_for: int, square: bool = False) -> Layout:
        """Return the blocks into which the problem is cut.

        Parameters
        ----------
        blocks_for : int
            The least number of blocks of heads, as far as there are heads.
        square : bool
            Whether tiles have as many rows as keys, for products along either axis; otherwise
            tiles are long along the keys, so that few partial sums have to be added.
        """
        groups, rows, dim = self.q.shape[1:]
        keys = self.k.shape[1]
        widest = max(dim, self.v.shape[-1], 1)
        tile, key_tile = (64, 64) if square else (32, 128)
        while tile * key_tile * widest > PRODUCTS and key_tile > 16:
            key_tile //= 2
            tile = min(tile, key_tile) if square else tile
        key_tile = min(key_tile, max(keys, 1))
        while 2 * tile * key_tile * widest <= PRODUCTS and tile < 128:
            tile *= 2
        key_block = min(max(keys, 1), _KEYS)
        row_block = max(tile, _ELEMENTS // (key_block * groups))
        row_block = min(row_block, max(rows, 1))
        heads = max(1, _ELEMENTS // (row_block * key_block * groups))
        heads = min(heads, max(1, self.count // max(1, blocks_for)))
        return Layout(heads, cut(rows, tile, row_block), cut(keys, key_tile, key_block))

    def batches(self, first: int, last: int) -> Any:
        """Return the batch index of each of the heads ``first:last``."""
        return np.arange(first, last) // self.heads_per_batch


class Block:
    """The scores of key heads ``first:last`` and some rows, for one key block at a time."""

    def __init__(self, problem: Problem, first: int, last: int, rows: Rows) -> None:
        self.problem, self.first, self.last, self.rows = problem, first, last, rows
        c = problem.c
        self.heads, self.groups = last - first, problem.q.shape[1]
        self.at = (slice(first, last), slice(None), slice(rows.start, rows.stop))
        self.q = self.tiled(problem.q)
        self.values: dict[str, Any] = {}
        if c.expression is not None:
            count = problem.heads_per_batch
            for name, value in problem.o.values.items():
                flat = np.broadcast_to(value.reshape(-1), (count,))
                chosen = flat[np.arange(first, last) % count]
                self.values[name] = chosen.reshape(-1, 1, 1, 1, 1, 1)

    def tiled(self, x: Any) -> Any:
        """View this block's part of (P, G, N, E) as tiles (P, G, gq, 1, tq, E)."""
        x = x[self.at]
        return x.reshape(*x.shape[:2], self.rows.tiles, 1, self.rows.size, x.shape[-1])

    def key_tiles(self, x: Any, keys: Rows) -> Any:
        """View keys (P, M, E) as tiles (P, 1, 1, gk, tk, E)."""
        x = x[self.first : self.last, keys.start : keys.stop]
        return x.reshape(x.shape[0], 1, 1, keys.tiles, keys.size, x.shape[-1])

    def shape(self, keys: Rows) -> tuple[int, ...]:
        """Return the shape of a block of scores."""
        return (self.heads, self.groups, self.rows.tiles, keys.tiles, self.rows.size, keys.size)

    def seen_keys(self, keys: tuple[Rows, ...]) -> Iterator[Rows]:
        """Yield the key blocks that some row may see by position."""
        low, high = self.problem.o.visibility.key_range(self.rows.start, self.rows.stop)
        for part in keys:
            if part.stop > low and part.start < high:
                yield part

    def inner(self, keys: Rows) -> Any:
        """Compute q.k, scaled where log kappa is linear in it, into this thread's buffer."""
        s = buffer("scores", self.shape(keys), self.problem.dtype)
        k = self.problem.k_turned[self.first : self.last, :, keys.start : keys.stop]
        k = k.reshape(k.shape[0], 1, 1, k.shape[1], keys.tiles, keys.size).swapaxes(3, 4)
        return np.matmul(self.q, k, out=s)

    def log_kappa(self, s: Any, keys: Rows) -> Any:
        """Turn inner products into log kappa with its biases, in place."""
        problem, c = self.problem, self.problem.c
        if c.expression is not None:
            result = c.expression({"s": s, **self.values}, np)
            s[...] = result
        if problem.key_bias is not None:
            s += self.key_tiles(problem.key_bias[..., None], keys).swapaxes(-1, -2)
        if problem.o.bias is not None:
            s += self.caller(problem.o.bias, keys)
        return s

    def hidden(self, keys: Rows) -> Any:
        """Return which scores are not visible; None where all are."""
        problem, view = self.problem, self.problem.o.visibility
        parts = []
        if not view.whole(self.rows.start, self.rows.stop, keys.start, keys.stop):
            parts.append(self._by_position(keys))
        if problem.key_mask is not None:
            real = problem.key_mask[problem.batches(self.first, self.last), keys.start : keys.stop]
            if not real.all():
                parts.append(~real.reshape(self.heads, 1, 1, keys.tiles, 1, keys.size))
        if view.mask is not None:
            seen = view.by_mask(self.rows.start, self.rows.stop, keys.start, keys.stop)
            parts.append(~self._spread(seen, keys))
        if not parts:
            return None
        hidden = parts[0]
        for part in parts[1:]:
            hidden = hidden | part
        return hidden

    def _by_position(self, keys: Rows) -> Any:
        problem, view = self.problem, self.problem.o.visibility
        position: Any = np.arange(self.rows.start, self.rows.stop)
        position = position.reshape(self.rows.tiles, 1, self.rows.size, 1)
        if problem.offsets is None:
            position = position + view.offset
        else:
            offsets = problem.offsets[problem.batches(self.first, self.last)]
            position = position + offsets.reshape(-1, 1, 1, 1, 1, 1)
        begin: Any = np.arange(keys.start, keys.stop) * view.scale
        begin = begin.reshape(keys.tiles, 1, keys.size)
        hidden = None
        if view.support.ahead != math.inf:
            hidden = begin + (view.scale - 1) > position + int(view.support.ahead)
        if view.support.left != math.inf:
            far = begin < position - int(view.support.left)
            hidden = far if hidden is None else hidden | far
        return hidden

    def caller(self, x: Any, keys: Rows) -> Any:
        """Cut a caller's array, broadcastable to (*B, H, G, N, M), to the tiles of this block."""
        if x.shape[-2] != 1:
            x = x[..., self.rows.start : self.rows.stop, :]
        if x.shape[-1] != 1:
            x = x[..., keys.start : keys.stop]
        return self._spread(x, keys)

    def _spread(self, x: Any, keys: Rows) -> Any:
        lead = self.problem.lead
        rows = self.rows.stop - self.rows.start
        if all(n == 1 for n in x.shape[:-3]):
            x = x.reshape(1, *x.shape[-3:])
        else:
            whole = np.broadcast_to(x, (*lead, *x.shape[-3:]))
            x = np.stack([whole[np.unravel_index(p, lead)] for p in range(self.first, self.last)])
        x = np.broadcast_to(x, (*x.shape[:2], rows, keys.stop - keys.start))
        x = x.reshape(*x.shape[:2], self.rows.tiles, self.rows.size, keys.tiles, keys.size)
        return x.swapaxes(-3, -2)
