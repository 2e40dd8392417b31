"""The blocks of a contraction by scores, of sizes for which XLA is fast.

Arrays are in a dict by the names of `Operands`. The leading axes are those of heads; inside a map
over heads there are none. Loops over equal blocks are `lax.map` and `lax.scan`; the rows or keys
that remain are one smaller block, so no row and no key is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pdcore.extend import Support, Visibility

from .namespace import NAMESPACE as xp

__all__ = [
    "Arrays",
    "StaticCall",
    "BlockSizes",
    "over_heads",
    "over_keys",
    "over_rows",
    "sizes",
    "ungrouped",
]

Arrays = dict[str, Any]

#: The axis of rows, and of keys; a mask or bias may have length 1 along either.
_ROWS = {"q": -2, "out": -2, "bias": -2, "mask": -2, "level": -1, "q_labels": -1, "runs": -1}
_ROWS |= dict.fromkeys(("first_lane", "second_lane"), -1)
_KEYS = {"k": -2, "v": -2}
_KEYS |= dict.fromkeys(
    ("key_bias", "key_mask", "bias", "mask", "k_labels", "key_runs", "key_index"), -1
)
#: The number of axes after those of heads. Arrays of the first dict may have one more, of groups.
_BY_GROUP = dict.fromkeys(("q", "out", "bias", "mask", "offset"), 2)
_BY_GROUP |= dict.fromkeys(("level", "q_labels", "runs", "first_lane", "second_lane"), 1)
_OF_KEYS = {"k": 2, "v": 2, "key_bias": 1, "key_mask": 1, "k_labels": 1, "key_runs": 1}
_OF_KEYS["key_index"] = 1
_BROADCAST = ("bias", "mask")

#: Scores in memory at a time, 8 MiB in float32: they fit in the caches of one or two cores.
_BLOCK = 1 << 21
_KEY_BLOCK = 4096
_ROW_BLOCK = 1024
#: Scores of the heads that run as one batch, 1 MiB in float32: what all steps of a small batch
#: write stays in the caches, and its memory is not mapped anew in every call.
_BATCH = 1 << 18
#: Heads with at most this many scores are not cut into blocks of rows and keys.
_SMALL = 1 << 15
#: Causal rows run in at most _BANDS bands, each with the keys that its last row sees; XLA compiles
#: each band separately. With more than _BANDED_KEYS keys, or more than one block of keys, one
#: program for all rows skips the blocks of keys that no row sees.
_BANDS = 4
_BANDED_KEYS = 4096
_SKIPPED_KEYS = 1024


class BlockSizes(NamedTuple):
    """The sizes of the blocks of a contraction.

    Attributes
    ----------
    heads : int or None
        The key heads of a batch, batches run one after the other; None for all heads at once.
    rows, keys : int
        The most rows and keys of a block.
    """

    heads: int | None
    rows: int
    keys: int


def sizes(
    heads: int, group: int, rows: int, keys: int, *, turns: bool, restricts: bool = False
) -> BlockSizes:
    """Choose the sizes of the blocks by shape.

    Matrix products of XLA on a CPU are fast if they are large and if they stay in its caches, so
    large heads run one after the other, and small heads in batches. Heads that may be on several
    devices always run as one batch, and so do heads on a GPU, where that is fast.

    Parameters
    ----------
    heads : int
        The number of key heads of all sequences.
    group, rows, keys : int
        G, N and M.
    turns : bool
        Whether heads may run one after the other.
    restricts : bool
        Whether rows do not see all keys by their positions.
    """
    scores = group * rows * keys
    batch = max(1, _BATCH // max(1, scores)) if turns and heads > 1 else None
    if scores <= _SMALL and scores * (batch or heads) <= 8 * _BLOCK:
        return BlockSizes(batch, max(rows, 1), max(keys, 1))
    key_block = max(1, min(keys, _KEY_BLOCK if turns else 1024))
    if restricts and keys > _BANDED_KEYS:
        key_block = _SKIPPED_KEYS
    fit = max(16, _BLOCK // (group * (batch or heads) * key_block))
    return BlockSizes(batch, min(max(rows, 1), fit, _ROW_BLOCK), key_block)


@dataclass(frozen=True)
class StaticCall:
    """The part of a contraction that is static under `jax.jit`.

    Attributes
    ----------
    contraction : Scores
        The contraction.
    support : Support
        Restrictions by position.
    rows, keys : int
        N and the number of keys.
    scale : int
        The length of the pooling window.
    offset : int or None
        The position of query 0; None if the position is an array.
    sizes : BlockSizes
        The sizes of the blocks.
    dropout : float
        The probability that a weight is dropped.
    """

    contraction: Any
    support: Support
    rows: int
    keys: int
    scale: int
    offset: int | None
    sizes: BlockSizes
    dropout: float = 0.0

    def visibility(self, rows: int, keys: int, offset: Any) -> Visibility:
        """Return the visibility by position only, of a block whose first key is at position 0."""
        return Visibility(
            self.support, xp, rows, keys * self.scale, self.scale, offset, None, None, None, None
        )


def ungrouped(arrays: Arrays) -> Arrays:
    """Return arrays without the axis of groups, of length 1: XLA is faster without the axis."""
    return {
        name: x if name in _OF_KEYS else jnp.squeeze(x, -1 - _BY_GROUP.get(name, 2))
        for name, x in arrays.items()
    }


def over_heads(call: StaticCall, body: Callable[[Arrays], Arrays], arrays: Arrays) -> Arrays:
    """Run `body`, a function of the arrays of one key head, on batches of key heads.

    An array without an axis of heads, or that is broadcast along some of several leading axes, is
    indexed for each head; a copy for every head could be as large as all scores.
    """
    size = call.sizes.heads
    if size is None:
        return body(arrays)
    lead = arrays["k"].shape[:-2]
    count = math.prod(lead)
    turns: Arrays = {}
    shared: Arrays = {}
    for name, x in arrays.items():
        leading = tuple(x.shape[: x.ndim - _axes(name, arrays)])
        tail = tuple(x.shape[len(leading) :])
        if leading == lead:
            turns[name] = jnp.reshape(x, (count, *tail))
        else:
            shared[name] = (jnp.reshape(x, (-1, *tail)), leading)

    def turn(indexed: tuple[Any, Arrays]) -> Arrays:
        index, cut = indexed
        places: list[Any] = []
        for size in reversed(lead):
            places.insert(0, index % size)
            index = index // size
        for name, (x, leading) in shared.items():
            place: Any = 0
            for size, at in zip(leading, places[len(lead) - len(leading) :], strict=True):
                place = place * size + (at if size != 1 else 0)
            cut = {**cut, name: lax.dynamic_index_in_dim(x, place, keepdims=False)}
        return body(cut)

    batch_size = None if size == 1 else size
    results = lax.map(turn, (jnp.arange(count), turns), batch_size=batch_size)
    return {name: jnp.reshape(x, (*lead, *x.shape[1:])) for name, x in results.items()}


def _axes(name: str, arrays: Arrays) -> int:
    """Return the number of axes of an array after those of heads."""
    name = name.removeprefix("d_")
    if name in _OF_KEYS:
        return _OF_KEYS[name]
    groups = int(arrays["q"].ndim - arrays["k"].ndim)
    return _BY_GROUP.get(name, 2) + groups


def over_rows(call: StaticCall, body: Callable[..., Arrays], arrays: Arrays) -> Arrays:
    """Run ``body(arrays, visibility, whole)`` on blocks of rows with the keys that they can see.

    `visibility` is that of the block by position; `whole` states that every row sees every key.
    """
    parts = []
    for band in _bands(call):
        parts += _band(call, body, arrays, *band)
    if len(parts) == 1:
        return parts[0]
    return {name: jnp.concat([part[name] for part in parts], axis=_ROWS[name]) for name in parts[0]}


def _band(
    call: StaticCall,
    body: Callable[..., Arrays],
    arrays: Arrays,
    start: int,
    stop: int,
    first: int,
    last: int,
) -> list[Arrays]:
    """Run the rows ``start:stop`` with the keys ``first:last``; return the parts of the result."""
    whole = call.visibility(call.rows, call.keys, call.offset).whole(start, stop, first, last)
    arrays = _cut(_cut(arrays, _ROWS, start, stop), _KEYS, first, last)
    block = min(call.sizes.rows, stop - start)
    count = (stop - start) // block
    reach = None if whole else _reach(call, block, last - first)

    def run(cut: Arrays, at: Any, rows: int) -> Arrays:
        offset = call.offset if call.offset is not None else cut.pop("offset")
        offset = offset + start + at - first * call.scale
        keys = cut["k"].shape[-2]
        if reach is not None and jnp.size(offset) == 1:
            low = jnp.reshape(jnp.asarray(offset), ()) - int(call.support.left)
            begin = jnp.clip(-(-low // call.scale), 0, keys - reach)
            cut = _slide(cut, begin, reach)
            offset, keys = offset - begin * call.scale, reach
        return body(cut, call.visibility(rows, keys, offset), whole)

    if count == 1:
        parts = [run(_cut(arrays, _ROWS, 0, block), 0, block)]
    else:
        moving, still = _split(arrays, _ROWS, block, count)

        def turn(indexed: tuple[Any, Arrays]) -> Arrays:
            index, cut = indexed
            return run({**still, **cut}, index * block, block)

        results = lax.map(turn, (jnp.arange(count), moving))
        parts = [{name: _joined(x, _ROWS[name]) for name, x in results.items()}]
    done = count * block
    if done < stop - start:
        rest = _cut(arrays, _ROWS, done, stop - start)
        parts.append(run(rest, done, stop - start - done))
    return parts


def over_keys(
    call: StaticCall,
    body: Callable[..., Any],
    merge: Callable[[Any, Any], Any],
    arrays: Arrays,
    visibility: Visibility,
) -> Any:
    """Run ``body(arrays, visibility)`` on blocks of keys, and merge the results in order."""
    keys, block = arrays["k"].shape[-2], call.sizes.keys
    count = keys // block
    if keys <= block:
        return body(arrays, visibility)
    moving, still = _split(arrays, _KEYS, block, count)

    def at(cut: Arrays, first: Any, size: int) -> Any:
        seen = call.visibility(visibility.rows, size, visibility.offset - first * call.scale)
        return body({**still, **cut}, seen)

    # The sums start from the first block, so that they vary over devices as the block does.
    total = at({name: x[0] for name, x in moving.items()}, 0, block)
    if count > 1:
        rest = {name: x[1:] for name, x in moving.items()}

        def step(total: Any, indexed: tuple[Any, Arrays]) -> tuple[Any, None]:
            index, cut = indexed

            def more(total: Any) -> Any:
                return merge(total, at(cut, index * block, block))

            if not (call.support.restricts or "runs" in arrays):
                return more(total), None
            seen = _any_seen(call, visibility, index * block, block)
            if "runs" in arrays:
                a, b = arrays["runs"], cut["key_runs"]  # both ascend
                seen &= jnp.any((a[..., -1] >= b[..., 0]) & (b[..., -1] >= a[..., 0]))
            return lax.cond(seen, more, lambda total: total, total), None

        total, _ = lax.scan(step, total, (jnp.arange(1, count), rest))
    if count * block < keys:
        tail = _cut(arrays, _KEYS, count * block, keys)
        total = merge(total, at(tail, count * block, keys - count * block))
    return total


def _any_seen(call: StaticCall, visibility: Visibility, first: Any, keys: int) -> Any:
    """Return whether a row may see, by position, one of `keys` keys from `first` on."""
    support, offset = call.support, jnp.asarray(visibility.offset)
    begin, end = first * call.scale, (first + keys) * call.scale - 1
    seen = jnp.asarray(True)
    if support.ahead != math.inf:
        last = jnp.max(offset) + visibility.rows - 1 + int(support.ahead)
        seen &= begin + call.scale - 1 <= last
    if support.left != math.inf:
        seen &= end >= jnp.min(offset) - int(support.left)
    return seen


def _bands(call: StaticCall) -> list[tuple[int, int, int, int]]:
    """Return bands of rows (start, stop) with the keys (first, last) that the rows can see."""
    several = call.keys > call.sizes.keys  # `over_keys` skips blocks of keys
    if not call.support.restricts or call.offset is None or not call.rows or several:
        return [(0, call.rows, 0, call.keys)]
    least = min(call.sizes.rows, 256)
    size = max(least, -(-call.rows // _BANDS))
    size = -(-size // least) * least
    seen = call.visibility(call.rows, call.keys, call.offset)
    bands = []
    for start in range(0, call.rows, size):
        stop = min(start + size, call.rows)
        first, last = seen.key_range(start, stop)
        # Rows that see no key get one hidden key, because the maximum of no entries is an error.
        first = min(first, call.keys - 1)
        bands.append((start, stop, first, max(last, first + 1)))
    return bands


def _reach(call: StaticCall, rows: int, keys: int) -> int | None:
    """Return the most keys that a block of rows sees through a window; None for all keys."""
    support = call.support
    if float("inf") in (support.left, support.ahead):
        return None
    span = rows + int(support.left) + int(support.ahead)
    reach = span // call.scale + 2
    return reach if reach < keys else None


def _axis(axes: dict[str, int], name: str, x: Any) -> int | None:
    """Return the axis of rows, or of keys; None if the array has no such axis, or is broadcast."""
    name = name.removeprefix("d_")
    axis = axes.get(name)
    if axis is None or (name in _BROADCAST and x.shape[axis] == 1):
        return None
    return int(axis % x.ndim)


def _slide(arrays: Arrays, begin: Any, size: int) -> Arrays:
    """Return arrays with `size` keys from a traced index on."""
    windowed = {}
    for name, x in arrays.items():
        axis = _axis(_KEYS, name, x)
        windowed[name] = x if axis is None else lax.dynamic_slice_in_dim(x, begin, size, axis)
    return windowed


def _cut(arrays: Arrays, axes: dict[str, int], start: int, stop: int) -> Arrays:
    slices = {}
    for name, x in arrays.items():
        axis = _axis(axes, name, x)
        if axis is None or (start == 0 and stop == x.shape[axis]):
            slices[name] = x
        else:
            slices[name] = lax.slice_in_dim(x, start, stop, axis=axis)
    return slices


def _split(arrays: Arrays, axes: dict[str, int], block: int, count: int) -> tuple[Arrays, Arrays]:
    """Split arrays into `count` blocks on a new first axis; return these and the others."""
    moving, still = {}, {}
    for name, x in _cut(arrays, axes, 0, block * count).items():
        at = _axis(axes, name, x)
        if at is None:
            still[name] = x
            continue
        blocks = jnp.reshape(x, (*x.shape[:at], count, block, *x.shape[at + 1 :]))
        moving[name] = jnp.moveaxis(blocks, at, 0)
    return moving, still


def _joined(x: Any, axis: int) -> Any:
    """Return a result with its blocks joined, the inverse of `_split`."""
    at = axis % (x.ndim - 1)
    x = jnp.moveaxis(x, 0, at)
    return jnp.reshape(x, (*x.shape[:at], -1, *x.shape[at + 2 :]))
