"""Array calls on the rows of a state: rows from a place, written rows, kept rows.

A place or a count is an int for all sequences, where the lengths are at hand and equal, or an
integer array (*B,). Nothing is written in place unless the caller asks for it.
"""

from __future__ import annotations

from typing import Any

from ..arrays import device_of

__all__ = [
    "Place",
    "below",
    "kept",
    "last_row",
    "later",
    "like",
    "picked",
    "place",
    "rows_from",
    "two_sum",
    "whole_div",
    "written",
    "zeroed",
]

Place = Any  # int or integer array (*B,)


def place(x: Place, axes: int) -> Any:
    """Return a place with `axes` more axes of length 1; an int as it is."""
    return x if isinstance(x, int) else x[(..., *(None,) * axes)]


def whole_div(x: Place, divisor: int) -> Place:
    """Return floor(x / divisor)."""
    return x if divisor == 1 else x // divisor


def below(count: int, bound: Place, like: Any, xp: Any) -> Any:
    """Return whether each index 0 .. count - 1 is below a bound: bool (count,) or (*B, count)."""
    index = xp.arange(count, dtype=xp.int64, device=device_of(like))
    return index < place(bound, 1)


def last_row(x: Any) -> Any:
    """Return the last row of x (*B, H, T, D), (*B, H, 1, D)."""
    return x if x.shape[-2] == 1 else x[..., -1:, :]


def rows_from(x: Any, start: Place, count: int, xp: Any) -> Any:
    """Return `count` rows of x (*B, H, T, D) from a place; rows outside of x are unspecified."""
    length = x.shape[-2]
    if isinstance(start, int) and start >= 0 and start + count <= length:
        return x[..., start : start + count, :]
    if not length or not count:
        shape = (*x.shape[:-2], count, x.shape[-1])
        return xp.zeros(shape, dtype=x.dtype, device=device_of(x))
    index = xp.arange(count, dtype=xp.int64, device=device_of(x)) + place(start, 1)
    index = xp.minimum(xp.maximum(index, xp.zeros_like(index)), xp.full_like(index, length - 1))
    if isinstance(start, int):
        return xp.take(x, index, axis=x.ndim - 2)
    index = xp.broadcast_to(index[..., None, :, None], (*x.shape[:-2], count, x.shape[-1]))
    return xp.take_along_axis(x, index, axis=x.ndim - 2)


def kept(old: Any, new: Any, count: Place, xp: Any) -> Any:
    """Return as many rows as `old` has: the last ones after `count` of the rows `new` follow."""
    rows = old.shape[-2]
    if not rows:
        return old
    if isinstance(count, int) and count >= rows:
        return new if count == rows == new.shape[-2] else new[..., count - rows : count, :]
    return rows_from(xp.concat([old, new], axis=-2), count, rows, xp)


def written(x: Any, new: Any, start: Place, count: Place, xp: Any, *, in_place: bool) -> Any:
    """Return x (*B, H, T, D) with the first `count` rows of `new` at a place.

    Rows beyond the end of x are dropped.
    """
    if not new.shape[-2]:
        return x
    length, known = x.shape[-2], isinstance(start, int) and isinstance(count, int)
    if known:
        stop = min(start + count, length)
        if in_place:
            x[..., start:stop, :] = new[..., : stop - start, :]
            return x
        parts = [x[..., :start, :], new[..., : stop - start, :], x[..., stop:, :]]
        return xp.concat(parts, axis=-2)
    if in_place and new.shape[-2] <= length:
        return _put(x, new, start, count, xp)
    # For each row of x, the row of `new` that takes its place.
    index = xp.arange(length, dtype=xp.int64, device=device_of(x)) - place(start, 1)
    inside = (index >= 0) & (index < place(count, 1))
    moved = rows_from(new, -start, length, xp)
    moved = xp.where(inside[..., None, :, None], moved, x)
    if in_place:
        x[...] = moved
        return x
    return moved


def _put(x: Any, new: Any, start: Any, count: Any, xp: Any) -> Any:
    """Write rows at a place of each sequence into the memory of x, by arrays of fixed shapes."""
    *lead, heads, length, dim = x.shape
    many = new.shape[-2]
    flat, rows = xp.reshape(x, (-1, heads, length, dim)), xp.reshape(new, (-1, heads, many, dim))
    index = xp.arange(many, dtype=xp.int64, device=device_of(x))
    # Rows that are not written have a place too, none of which is that of another row.
    at = xp.reshape((place(start, 1) + index) % length, (-1, many))
    real = below(many, count, x, xp) & below(many, length - start, x, xp)
    real = xp.reshape(xp.broadcast_to(real, (*lead, many)), (-1, many))[:, :, None, None]
    at = xp.broadcast_to(at, (flat.shape[0], many))
    sequence = xp.arange(flat.shape[0], dtype=xp.int64, device=device_of(x))[:, None]
    rows = xp.permute_dims(rows, (0, 2, 1, 3))
    flat[sequence, :, at] = xp.where(real, rows, flat[sequence, :, at])
    return x


def zeroed(x: Any, length: Place, xp: Any) -> Any:
    """Return x (*B, H, T, D) with zeros from a place on."""
    real = below(x.shape[-2], length, x, xp)
    return xp.where(real[..., None, :, None], x, xp.zeros_like(x))


def two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """Return a + b as rounded, and the rounding error exactly (Knuth's two-sum)."""
    total = a + b
    more = total - a
    return total, (a - (total - more)) + (b - more)


def like(x: Any, other: Any, xp: Any) -> Any:
    """Return x in the dtype of another array."""
    return x if x.dtype == other.dtype else xp.astype(x, other.dtype)


def later(a: Place, b: Place, xp: Any) -> Place:
    """Return the larger of two places."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    array = b if isinstance(a, int) else a
    a, b = (xp.full_like(array, x) if isinstance(x, int) else x for x in (a, b))
    return xp.maximum(a, b)


def picked(x: Any, index: Any, xp: Any) -> Any:
    """Return rows of x (*B, H, T, D) by index, (R,) or (*B, R)."""
    if index.ndim == 1:
        return xp.take(x, index, axis=x.ndim - 2)
    shape = (*x.shape[:-2], index.shape[-1], x.shape[-1])
    return xp.take_along_axis(x, xp.broadcast_to(index[..., None, :, None], shape), axis=x.ndim - 2)
