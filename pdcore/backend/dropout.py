"""Dropout of weights by a stream of random numbers that is the same in every library.

Weight (b h, i, j) of a call is kept where u32(seed, b h, i, j) >= t. The number is the mix that
docs/semantics.md defines; here it is computed in integers of the backend, for one block of
weights at a time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..arrays import device_of, dtype_name

__all__ = ["Dropout", "kept", "row_lanes", "seed_words", "threshold"]

_MASK = 0xFFFFFFFF
_FIRST, _SECOND, _THIRD = 0x7FEB352D, 0x846CA68B, 0x9E3779B1
_STEP = 0x9E3779B9
#: Where the two lanes of a row start, digits of pi.
_STARTS = (0x243F6A88, 0x85A308D3)


def threshold(p: float) -> int:
    """Return t: a weight is kept where its number is at least this."""
    return min(math.ceil(p * 2.0**32), _MASK)


def _times(x: Any, factor: int, xp: Any) -> Any:
    """Multiply words by a number, modulo 2^32."""
    if x.dtype == xp.uint32:
        return x * _word(factor, x, xp)
    # No product of an int64 is above 2^48.
    return ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & _MASK


def _plus(x: Any, y: Any, xp: Any) -> Any:
    """Add words, modulo 2^32."""
    y = _word(y, x, xp) if isinstance(y, int) else y
    return x + y if x.dtype == xp.uint32 else (x + y) & _MASK


def _word(value: int, like: Any, xp: Any) -> Any:
    """Return a number for an operation with words; not every library takes 2^31 for a uint32."""
    if like.dtype != xp.uint32:
        return value
    return xp.asarray(value, dtype=like.dtype, device=device_of(like))


def seed_words(seed: Any, like: Any, *, xp: Any) -> tuple[Any, Any]:
    """Return the low and the high 32 bits of a seed, in the dtype of `like`.

    Parameters
    ----------
    seed : int, integer array (), or integer array (2,)
        One of 32 bits has the high bits 0; one (2,) has the low bits first.
    like : integer array
        An array of words.
    """
    if isinstance(seed, int):
        low, high = (
            xp.asarray(word, dtype=like.dtype, device=device_of(like))
            for word in (seed & _MASK, seed >> 32)
        )
        return low, high
    if seed.ndim:
        return _masked(seed[0], like, xp), _masked(seed[1], like, xp)
    if not dtype_name(seed).endswith("64"):
        return _masked(seed, like, xp), xp.zeros_like(_masked(seed, like, xp))
    wide = xp.astype(seed, xp.int64)
    return _masked(wide & _MASK, like, xp), _masked((wide >> 32) & _MASK, like, xp)


def _masked(x: Any, like: Any, xp: Any) -> Any:
    x = xp.astype(x, like.dtype)
    return x if like.dtype == xp.uint32 else x & _MASK


def _mixed(x: Any, xp: Any) -> Any:
    """Return the image of words by lowbias32, a bijection."""
    x = _times(x ^ (x >> 16), _FIRST, xp)
    x = _times(x ^ (x >> 15), _SECOND, xp)
    return x ^ (x >> 16)


def row_lanes(words: tuple[Any, Any], heads: Any, rows: Any, *, xp: Any) -> tuple[Any, Any]:
    """Return the two words of every row of weights.

    Parameters
    ----------
    words : pair of integer array ()
        The low and the high 32 bits of the seed.
    heads, rows : integer array
        The indices b h and i, broadcastable to each other, of the dtype of the words.
    """
    lanes = []
    for start in _STARTS:
        h = words[0] ^ _word(start, rows, xp)
        h = _plus(_mixed(h, xp), _STEP, xp) ^ words[1]
        h = _plus(_mixed(h, xp), _STEP, xp) ^ heads
        h = _plus(_mixed(h, xp), _STEP, xp) ^ rows
        lanes.append(_mixed(h, xp))
    return lanes[0], lanes[1]


def kept(lanes: tuple[Any, Any], keys: Any, least: int, *, xp: Any) -> Any:
    """Return which weights are kept, bool.

    Parameters
    ----------
    lanes : pair of integer array
        The lanes of the rows, from `row_lanes`.
    keys : integer array
        The indices j, broadcastable to the lanes.
    least : int
        See `threshold`.
    """
    first, second = lanes
    x = _plus(first, _times(keys, _STEP, xp), xp)
    x = _times(x ^ (x >> 16), _FIRST, xp)
    x = _plus(x ^ (x >> 15), second, xp)
    x = _times(x, _SECOND, xp)
    x = _times(x ^ (x >> 16), _THIRD, xp)
    return (x ^ (x >> 15)) >= _word(least, x, xp)


class Dropout(NamedTuple):
    """The dropout of the weights of one head group.

    Attributes
    ----------
    p : float
        The probability that a weight is dropped.
    lanes : pair of integer array (*B, H, G, N)
        See `row_lanes`.
    scale : int
        The positions of a pooled key; its index is that of the first.
    first : int or integer array ()
        The index of key 0, which is not 0 in a shard of a sequence.
    """

    p: float
    lanes: tuple[Any, Any]
    scale: int
    first: Any = 0

    @property
    def factor(self) -> float:
        """What kept weights are multiplied by."""
        return 1.0 / (1.0 - self.p)

    def keys(self, first: int, last: int, xp: Any) -> Any:
        """Return the indices j of some keys."""
        like = self.lanes[0]
        index = xp.arange(first, last, dtype=like.dtype, device=device_of(like))
        index = index * _word(self.scale, like, xp)
        if isinstance(self.first, int) and not self.first:
            return index
        return index + xp.asarray(self.first, dtype=like.dtype, device=device_of(like))

    def factors(self, start: int, stop: int, first: int, last: int, like: Any, *, xp: Any) -> Any:
        """Return the factors of a block of weights, 0 or 1 / (1 - p), in the dtype of `like`."""
        lanes = tuple(x[..., start:stop, None] for x in self.lanes)
        seen = kept((lanes[0], lanes[1]), self.keys(first, last, xp), threshold(self.p), xp=xp)
        zero = xp.zeros_like(like)
        return xp.where(seen, zero + self.factor, zero)
