"""Entries of tables for blocks of queries and keys, and the sums of their cotangents.

Tables are (..., n, m), with n = 1 where they have one axis, and blocks (..., rows, keys). The
places of a block are p_j - p_i (rows, keys), labels of queries (rows, 1) and labels of keys
(1, keys), in the dtype of the block, with the axes of heads or without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arrays import device_of
from ..lowering import sum_to
from ..spec import DISTANCE, QUERY_LABEL, Expression

__all__ = ["entry_sums", "entry_values"]

Places = Mapping[Any, Any]


def entry_values(entry: Expression, table: Any, places: Places, *, xp: Any) -> Any:
    """Return an entry of a table for each query and key of a block, (..., rows, keys).

    An entry by one label has length 1 along the axis of the other label.
    """
    reads = _reads(entry)
    if reads == [DISTANCE]:
        return _shifted_lines(entry, table, places[DISTANCE], xp)
    if len(reads) == 2:
        of_rows = xp.matrix_transpose(_index(entry, 0, places[reads[0]], table.shape[-2], xp))
        table = xp.matrix_transpose(_along_last(xp.matrix_transpose(table), of_rows, xp))
    index = _index(entry, -1, places[reads[-1]], table.shape[-1], xp)
    if reads != [QUERY_LABEL]:
        return _along_last(table, index, xp)
    return xp.matrix_transpose(_along_last(table, xp.matrix_transpose(index), xp))


def entry_sums(
    entry: Expression, block: Any, places: Places, shape: tuple[int, ...], *, xp: Any
) -> Any:
    """Return the sums of a block over the pairs that read each entry of a table.

    Parameters
    ----------
    entry : Expression
        One of `Expression.entries`.
    block : array (..., rows, keys)
        The cotangents of the entry.
    places : mapping of str to array
    shape : tuple of int
        The shape of the table, (..., n, m).
    xp : namespace

    Returns
    -------
    array (..., n, m)
        Summed over the axes of heads that the table does not have, or not.
    """
    reads = _reads(entry)
    rows, keys = block.shape[-2:]
    if not rows * keys:
        return xp.zeros(shape, dtype=block.dtype, device=device_of(block))
    if reads == [DISTANCE]:
        diagonals = _diagonal_sums(block, xp)
        index = _index(entry, 0, _diagonals(places[DISTANCE], xp), shape[-1], xp)
        if index.ndim == 1:
            diagonals = sum_to(diagonals, (*shape[:-2], diagonals.shape[-1]), xp=xp)
        return xp.matmul(diagonals[..., None, :], _one_hot(index, shape[-1], block.dtype, xp))
    if len(reads) == 2:
        index = _index(entry, 0, places[reads[0]], shape[-2], xp)
        rows_of = _one_hot(index[..., 0], shape[-2], block.dtype, xp)
        block = xp.matmul(xp.matrix_transpose(rows_of), block)
    index = _index(entry, -1, places[reads[-1]], shape[-1], xp)
    if reads == [QUERY_LABEL]:
        index = xp.matrix_transpose(index)
        block = xp.matrix_transpose(xp.sum(block, axis=-1, keepdims=True))
    elif len(reads) == 1:
        block = xp.sum(block, axis=-2, keepdims=True)
    return xp.matmul(block, _one_hot(index[..., 0, :], shape[-1], block.dtype, xp))


def _reads(entry: Expression) -> list[str]:
    """Return the place that each index of an entry reads."""
    return [str(next(iter(index.inputs))) for index in entry.args[1:]]


def _index(entry: Expression, axis: int, place: Any, size: int, xp: Any) -> Any:
    """Return the indices along an axis of a table, whole numbers from 0 to `size` - 1."""
    index = entry.args[1:][axis]
    value = xp.floor(index({next(iter(index.inputs)): place}, xp))
    return xp.astype(xp.clip(value, 0.0, float(size - 1)), xp.int64)


def _along_last(x: Any, index: Any, xp: Any) -> Any:
    """Take entries of the last axis; the other axes of array and indices broadcast together."""
    if index.ndim == 1:
        return xp.take(x, index, axis=x.ndim - 1)
    a, b = x.shape[:-1], index.shape[:-1]
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    lead = tuple(m if n == 1 else n for n, m in zip(a, b, strict=True))
    x = xp.broadcast_to(x, (*lead, x.shape[-1]))
    return xp.take_along_axis(x, xp.broadcast_to(index, (*lead, index.shape[-1])), axis=-1)


def _one_hot(index: Any, size: int, dtype: Any, xp: Any) -> Any:
    """Return (..., length, size): 1 at each index (..., length), 0 elsewhere."""
    numbers = xp.arange(size, dtype=xp.int64, device=device_of(index))
    return xp.astype(index[..., None] == numbers, dtype)


def _diagonals(distance: Any, xp: Any) -> Any:
    """Return the p_j - p_i of the diagonals of a block, (..., rows + keys - 1), ascending."""
    return xp.concat([xp.flip(distance[..., 1:, 0], axis=-1), distance[..., 0, :]], axis=-1)


def _diagonal_sums(block: Any, xp: Any) -> Any:
    """Return the sums over the diagonals of a block: its columns, with each row shifted by one."""
    *lead, rows, keys = block.shape
    nothing = xp.zeros((*lead, rows, rows), dtype=block.dtype, device=device_of(block))
    flat = xp.reshape(xp.concat([xp.flip(block, axis=-2), nothing], axis=-1), (*lead, -1))
    length = rows + keys - 1
    return xp.sum(xp.reshape(flat[..., : rows * length], (*lead, rows, length)), axis=-2)


def _shifted_lines(entry: Expression, table: Any, distance: Any, xp: Any) -> Any:
    """Return the entries of a block by distance: each row is one line, shifted by one."""
    rows, keys = distance.shape[-2:]
    if not rows * keys:
        return xp.broadcast_to(table[..., :1, :1], (*table.shape[:-2], rows, keys))
    index = _index(entry, 0, _diagonals(distance, xp), table.shape[-1], xp)
    line = _along_last(table[..., 0, :], index, xp)
    *lead, length = line.shape
    flat = xp.reshape(xp.broadcast_to(line[..., None, :], (*lead, rows, length)), (*lead, -1))
    nothing = xp.zeros((*lead, rows), dtype=flat.dtype, device=device_of(flat))
    shifted = xp.reshape(xp.concat([flat, nothing], axis=-1), (*lead, rows, length + 1))
    return xp.flip(shifted, axis=-2)[..., :keys]
