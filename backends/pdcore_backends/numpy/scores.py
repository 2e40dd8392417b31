"""The contraction by scores and its pullback, tile by tile on all cores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from pdcore.extend import Operands, Scores, overflow_as_nan, score_contraction

from . import threads
from .threads import buffer
from .tiles import Block, Layout, Problem, Rows

__all__ = ["scores", "scores_vjp"]

# The bound on |log kappa| up to which exp needs no maximum subtracted: exp(-bound) is a normal
# number, and the sum of 10^9 weights exp(bound) is far from overflow.
_BOUNDED = {"float32": 40.0, "float64": 300.0}
_SMALL = 2**16  # scores; below this, starting threads costs more than they save


def scores(c: Scores, o: Operands) -> tuple[Any, Any]:
    """Contract by scores, see `score_contraction.scores`; `c.weight` is not "log_features"."""
    problem = Problem(c, o)
    shape = problem.q.shape[:3]
    out = np.empty((*shape, problem.v.shape[-1]), problem.dtype)
    level = np.full(shape, 0.0 if c.signed else -np.inf, problem.dtype)
    workers = _workers(problem)
    problem.turn(workers)
    layout = problem.layout(blocks_for=2 * workers if workers > 1 else 1)
    longest = _longest_key(problem)
    # Under causal, later rows see more keys: the longest tasks start first.
    tasks = list(_tasks(problem, layout))[::-1]

    def run(task: tuple[int, int, Rows]) -> None:
        block = Block(problem, *task)
        summed = block.tiled(out)
        total, peak = _accumulate(block, layout, summed, longest)
        if c.signed:
            return
        summed = summed[:, :, :, 0]
        none = total == 0
        if c.weight == "features":
            total = overflow_as_nan(total, xp)
        elif problem.k.shape[1] and (peak is not None or none.any()):
            total = _with_overflow(block, total, peak)
            none = total == 0
        total[none] = 1
        summed *= (1 / total)[..., None]
        if none.any():
            summed[none] = 0
        np.log(total, out=total)
        if peak is not None:
            total += peak
        total[none] = -np.inf
        level[block.at] = total.reshape(*total.shape[:2], -1)

    threads.run(run, tasks, workers)
    return out.reshape(*o.q.shape[:-1], out.shape[-1]), level.reshape(o.q.shape[:-1])


def _with_overflow(block: Block, total: Any, peak: Any) -> Any:
    """Replace sums that scores are missing from, see `score_contraction.with_overflow`."""
    c, q = block.problem.c, block.q[:, :, :, 0]
    if c.expression is None:
        ordinary = total != 0
        if peak is not None:
            ordinary &= abs(peak) <= score_contraction.ORDINARY
        if ordinary.all():
            return total
    reach = abs(block.problem.k[block.at[0]]).max(axis=1)[:, None, None, None, :]
    peak = total if peak is None else peak
    return score_contraction.with_overflow(c, total[..., None], peak[..., None], q, reach, xp=xp)[
        ..., 0
    ]


def _workers(problem: Problem) -> int:
    groups, rows = problem.q.shape[1:3]
    work = problem.count * groups * rows * problem.k.shape[1]
    return threads.count(small=work < _SMALL)


def _tasks(problem: Problem, layout: Layout) -> Iterator[tuple[int, int, Rows]]:
    for rows in layout.rows:
        for first in range(0, problem.count, layout.heads):
            yield first, min(first + layout.heads, problem.count), rows


def _longest_key(problem: Problem) -> float:
    """Return tau max |k|, for |log kappa| <= tau |q| max |k|; infinity where no bound holds."""
    o = problem.o
    if not problem.scaled or o.key_bias is not None or o.bias is not None:
        return math.inf
    return abs(problem.c.scale) * _longest(problem.k)


def _longest(x: Any) -> float:
    """Return the largest norm of a row."""
    return math.sqrt(np.einsum("...d,...d->...", x, x).max(initial=0))


def _accumulate(block: Block, layout: Layout, summed: Any, longest: float) -> tuple[Any, Any]:
    """Sum weights and weighted values over all key blocks.

    Parameters
    ----------
    block : Block
        The heads and rows.
    layout : Layout
        Holds the key blocks.
    summed : array (P, G, gq, 1, tq, Dv)
        The array into which the weighted values are summed.
    longest : float
        The result of `_longest_key`.

    Returns
    -------
    total : array (P, G, gq, tq)
        The summed weights.
    peak : array (P, G, gq, tq) or None
        The maximum that was subtracted from log kappa.
    """
    problem, c = block.problem, block.problem.c
    total: Any = np.zeros((*summed.shape[:3], summed.shape[4]), problem.dtype)
    peak: Any = None
    begun = False
    # A NaN in q compares False, so that a maximum is subtracted.
    bounded = longest < math.inf and longest * _longest(block.q) <= _BOUNDED[problem.dtype.name]
    ones = np.ones(layout.keys[0].size if layout.keys else 0, problem.dtype)
    for keys in block.seen_keys(layout.keys):
        s = block.inner(keys)
        hidden = block.hidden(keys)
        if c.weight == "log":
            block.log_kappa(s, keys)
        if hidden is not None:
            np.copyto(s, -np.inf if c.weight == "log" else 0, where=hidden)
        if c.weight == "log":
            if not bounded:
                peak = _lower(s, peak, total, summed[:, :, :, 0])
            np.exp(s, out=s)
        total += np.matmul(s, ones[: keys.size]).sum(axis=3)
        v = block.key_tiles(problem.v, keys)
        if keys.tiles == 1 and not begun:
            np.matmul(s, v, out=summed)
        else:
            part = buffer("part", (*s.shape[:-1], summed.shape[-1]), problem.dtype)
            np.matmul(s, v, out=part)
            if not begun:
                np.sum(part, axis=3, keepdims=True, out=summed)
            else:
                summed += part.sum(axis=3, keepdims=True) if keys.tiles > 1 else part
        begun = True
    if not begun:
        summed[...] = 0
    return total, None if peak is None else np.where(peak == -np.inf, 0, peak)


def _lower(s: Any, peak: Any, total: Any, summed: Any) -> Any:
    """Subtract the running maximum of each row, rescale the sums to it, and return it."""
    # First over tiles, which reads memory in order; a maximum over short rows does not.
    higher = s.max(axis=3).max(axis=-1)
    if peak is not None:
        np.maximum(higher, peak, out=higher)
    base = np.where(higher == -np.inf, 0, higher)
    s -= base[:, :, :, None, :, None]
    if peak is not None:
        shrink = np.exp(peak - base)
        total *= shrink
        summed *= shrink[..., None]
    return higher


def scores_vjp(
    c: Scores, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
) -> dict[str, Any]:
    """Pull back, see `score_contraction.scores_vjp`.

    The operands have no bias and no scalars per head. No two tasks write to the same keys, and
    the queries' cotangents of several key ranges are added in a fixed order, so that results do
    not depend on the order of the threads.
    """
    problem = Problem(c, o)
    shape = problem.q.shape
    level = level.reshape(shape[:3])
    d_out = np.ascontiguousarray(d_out).reshape(*shape[:3], d_out.shape[-1])
    delta = np.zeros_like(level)
    if not c.signed:
        delta = np.einsum("...d,...d->...", d_out, out.reshape(d_out.shape))
        delta -= np.where(level == -np.inf, 0, d_level.reshape(shape[:3]))
    workers = _workers(problem)
    problem.turn(workers)
    layout = problem.layout(blocks_for=workers, square=True)
    ranges = _key_ranges(problem, layout, workers)
    dq = np.zeros((len(ranges), *shape), problem.dtype)
    grads = {"k": np.zeros_like(problem.k), "v": np.zeros_like(problem.v)}
    if problem.key_bias is not None:
        grads["key_bias"] = np.zeros_like(problem.key_bias)
    clean = bool(np.isfinite(problem.v).all())

    def run(task: tuple[int, int, int]) -> None:
        first, last, part = task
        for rows in layout.rows:
            block = Block(problem, first, last, rows)
            cotangent = _Cotangent(block, level, delta, d_out, clean)
            for keys in block.seen_keys(ranges[part]):
                cotangent.add(keys, dq[part], grads)

    tasks = [
        (first, min(first + layout.heads, problem.count), part)
        for first in range(0, problem.count, layout.heads)
        for part in range(len(ranges))
    ]
    threads.run(run, tasks, workers)
    total = dq[0]
    for part in dq[1:]:
        total += part
    if problem.scaled:
        total *= problem.dtype.type(c.scale)
        grads["k"] *= problem.dtype.type(c.scale)
    shapes = {"k": o.k.shape, "v": o.v.shape, "key_bias": o.k.shape[:-1]}
    return {"q": total.reshape(o.q.shape), **{n: g.reshape(shapes[n]) for n, g in grads.items()}}


def _key_ranges(problem: Problem, layout: Layout, workers: int) -> list[tuple[Rows, ...]]:
    """Split the keys between workers where there are fewer heads than workers."""
    blocks = -(-problem.count // layout.heads)
    splits = min(len(layout.keys), -(-workers // max(1, blocks))) or 1
    if splits == 1:
        return [layout.keys]
    return [layout.keys[i::splits] for i in range(splits)]


class _Cotangent:
    """The pullback of the contraction for one block of rows."""

    def __init__(self, block: Block, level: Any, delta: Any, d_out: Any, clean: bool) -> None:
        self.block, self.clean = block, clean
        self.level = block.tiled(level[..., None])
        self.delta = block.tiled(delta[..., None])
        self.d_out = block.tiled(d_out)
        self.empty = self.level == -np.inf
        self.base = np.where(self.empty, 0, self.level)

    def add(self, keys: Rows, dq: Any, grads: dict[str, Any]) -> None:
        """Add the cotangents that one key block contributes."""
        block, problem, c = self.block, self.block.problem, self.block.problem.c
        s = block.inner(keys)
        slope: Any = None
        inverse: Any = None
        if c.expression is not None:
            slope = c.expression.derivative("s")({"s": s, **block.values}, np)
            slope = np.broadcast_to(slope, s.shape)
        hidden = block.hidden(keys)
        if c.weight == "log":
            block.log_kappa(s, keys)
            s -= self.base
            if hidden is not None:
                np.copyto(s, -np.inf, where=hidden)
            np.exp(s, out=s)
        else:
            if hidden is not None:
                np.copyto(s, 0, where=hidden)
            inverse = np.where(self.empty, 0, np.exp(-self.base))
            s *= inverse
        v = block.key_tiles(problem.v, keys)
        ds = buffer("cotangent", s.shape, problem.dtype)
        np.matmul(self.d_out, v.swapaxes(-1, -2), out=ds)
        ds -= self.delta
        if c.weight == "log":
            ds *= s
            if not self.clean:
                # A weight of 0 has no gradient, even where its factor is NaN or infinite.
                np.copyto(ds, 0, where=s == 0)
        else:
            ds *= inverse
            if hidden is not None:
                np.copyto(ds, 0, where=hidden)
        at = (slice(block.first, block.last), slice(keys.start, keys.stop))
        grads["v"][at] += self._per_key(s, self.d_out, keys)
        if "key_bias" in grads:
            summed = ds.sum(axis=(1, 2, 4))
            grads["key_bias"][at] += summed.reshape(summed.shape[0], -1)
        if slope is not None:
            np.multiply(ds, slope, out=ds, where=s != 0)
        grads["k"][at] += self._per_key(ds, block.q, keys)
        part = np.matmul(ds, block.key_tiles(problem.k, keys)).sum(axis=3)
        dq[block.at] += part.reshape(*part.shape[:2], -1, part.shape[-1])

    def _per_key(self, weight: Any, x: Any, keys: Rows) -> Any:
        """Sum weight^T x over the rows of the block and the query heads of a key head."""
        part = np.matmul(weight.swapaxes(-1, -2), x).sum(axis=(1, 2))
        return part.reshape(part.shape[0], part.shape[1] * part.shape[2], part.shape[3])
