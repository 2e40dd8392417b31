"""Support: which keys a query may see."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from ..arrays import clip_integers
from ..errors import SpecError
from .expression import DISTANCE, QUERY_LABEL
from .heads import windows

__all__ = ["Support", "Visibility", "all_of"]


def all_of(parts: list[Any]) -> Any:
    """Return the logical and of bool arrays that broadcast together; None for an empty list."""
    return reduce(operator.and_, parts) if parts else None


@dataclass(frozen=True)
class Support:
    """The restrictions that a spec puts on positions.

    Parameters
    ----------
    causal : bool
        Whether a query sees only keys at positions up to its own.
    left, right : int or inf
        How many positions before and after its own a query sees.
    """

    causal: bool = False
    left: float = math.inf
    right: float = math.inf

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            whole = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not whole or not (value == math.inf or (value >= 0 and value == int(value))):
                raise SpecError(f"sparse: {name} is {value!r}, expected a whole number >= 0 or inf")

    @property
    def ahead(self) -> float:
        """How many positions after its own a query may see: 0 under causal."""
        return 0 if self.causal else self.right

    @property
    def restricts(self) -> bool:
        """Whether visibility depends on positions."""
        return self.ahead != math.inf or self.left != math.inf

    def offsets(self, rows: int, length: int, scale: int) -> tuple[int, int]:
        """Return the range of offsets that matter: every other has the effect of the nearer end.

        Before it no query sees a key; after it every key is behind all queries, and their windows.
        """
        before = 0 if self.ahead == math.inf else int(self.ahead)
        behind = 0 if self.left == math.inf else int(self.left)
        return -(rows + before) - 1, length + scale + behind


@dataclass(frozen=True)
class Visibility:
    """The support of one call for the heads of one scale: positions, spans and masks.

    A pooled key j of scale s occupies the positions j s .. j s + s - 1, even where the last of
    these keys do not exist, and is visible only if all these positions are allowed.

    Attributes
    ----------
    support : Support
        The spec's restrictions.
    xp : namespace
        The array-API namespace.
    rows, length : int
        N, and the number M of keys before pooling.
    scale : int
        s.
    offset : int or integer array (*B, 1, 1, 1, 1)
        The position of query 0.
    key_mask : bool array (*B, 1, ceil(M / s)) or None
        True where the window has a real key.
    real : bool array (*B, M) or None
        True for a real key, before pooling.
    mask : bool array broadcastable to (*B, H, G, N, M) or None
        The caller's mask, before pooling, of the same rank.
    device : object
        The device on which arrays are created.
    labels : pair of integer arrays (*B, 1, 1, N) and (*B, 1, 1, M), or None
        The labels of queries and keys.
    runs : integer array (*B, N) or None
        The run of each query and key where ids of packed sequences are traced: a query sees the
        keys of its own run.
    """

    support: Support
    xp: Any
    rows: int
    length: int
    scale: int
    offset: Any
    key_mask: Any
    real: Any
    mask: Any
    device: Any
    labels: Any = None
    runs: Any = None

    @property
    def keys(self) -> int:
        """The number of keys after pooling."""
        return -(-self.length // self.scale)

    @property
    def static(self) -> bool:
        """Whether the positions of queries are Python ints, not arrays."""
        return isinstance(self.offset, int)

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """Return a range of keys that contains all keys visible to queries ``start:stop``.

        Returns
        -------
        tuple of int
            A half-open range, by position; all keys when positions are arrays.
        """
        if not self.static or stop <= start:
            return 0, self.keys
        low, high = 0, self.keys
        if self.support.ahead != math.inf:
            last = stop - 1 + self.offset + int(self.support.ahead)
            high = min(high, max(0, (last + 1) // self.scale))
        if self.support.left != math.inf:
            first = start + self.offset - int(self.support.left)
            low = max(0, -(-first // self.scale))
        return min(low, high), high

    def whole(self, start: int, stop: int, first: int, last: int) -> bool:
        """Return whether, by position, all queries ``start:stop`` see all keys ``first:last``."""
        if not self.support.restricts:
            return True
        if not self.static:
            return False
        low, high = 0, self.keys
        if self.support.ahead != math.inf:
            high = (start + self.offset + int(self.support.ahead) + 1) // self.scale
        if self.support.left != math.inf:
            low = -(-(stop - 1 + self.offset - int(self.support.left)) // self.scale)
        return low <= first and last <= high

    def positions(self, start: int, stop: int) -> Any:
        """Return the positions of queries, (rows, 1) or (*B, 1, 1, rows, 1)."""
        index = self.xp.arange(start, stop, dtype=self.xp.int64, device=self.device)
        return index[:, None] + self.offset

    def distances(self, start: int, stop: int, first: int, last: int) -> Any:
        """Return p_j - p_i of a block, integers (rows, keys) or (*B, 1, 1, rows, keys).

        The position of a key is that of the first key of its window.
        """
        begin = self.xp.arange(first, last, dtype=self.xp.int64, device=self.device) * self.scale
        return begin - self.positions(start, stop)

    def place(self, name: str, start: int, stop: int, first: int, last: int) -> Any:
        """Return an input of log kappa by its name, one of `PLACES`, for a block of integers."""
        if name == DISTANCE:
            return self.distances(start, stop, first, last)
        q_labels, k_labels = self.labels
        if name == QUERY_LABEL:
            return q_labels[..., start:stop, None]
        return k_labels[..., None, first:last]

    def oriented(self, x: Any) -> Any:
        """Return an array (..., rows, keys) with the axes of the scores, which are the same."""
        return x

    def prefix_counts(self, start: int, stop: int, ahead: int = 0) -> Any:
        """Count the keys whose whole span lies at positions up to ``p + ahead``.

        Returns
        -------
        integer array (rows, 1) or (*B, 1, 1, rows, 1)
            For each query, between 0 and the number of keys.
        """
        count = (self.positions(start, stop) + (1 + ahead)) // self.scale
        return clip_integers(count, self.keys, self.xp)

    def later_rows(self) -> Any:
        """Count, for each key, the queries at positions past the key's whole span.

        Returns
        -------
        integer array (keys, 1) or (*B, 1, 1, keys, 1)
            The counted queries are the last ones, since positions ascend.
        """
        xp = self.xp
        end = (xp.arange(self.keys, dtype=xp.int64, device=self.device) + 1) * self.scale - 1
        return clip_integers(self.rows - (end[:, None] - self.offset), self.rows, xp)

    def counts(self, bias: Any = None, terms: Callable[..., Any] | None = None) -> Any:
        """Count the visible keys of each query.

        Parameters
        ----------
        bias : array broadcastable to (*B, H, G, N, M), optional
            A bias of -inf removes a key.
        terms : callable, optional
            ``terms(start, stop, first, last)`` returns a block of another bias.

        Returns
        -------
        integer array broadcastable to (*B, H, G, N)
        """
        xp = self.xp
        if all(x is None for x in (self.mask, bias, terms, self.runs)):
            return self._counts_by_position()
        parts = []
        for start in range(0, self.rows, 256):
            stop = min(start + 256, self.rows)
            total: Any = 0
            for first in range(0, self.keys, 1024):
                last = min(first + 1024, self.keys)
                seen = self.block(start, stop, first, last)
                if seen is None:
                    seen = xp.ones((stop - start, last - first), dtype=xp.bool, device=self.device)
                if bias is not None:
                    part = bias if bias.shape[-2] == 1 else bias[..., start:stop, :]
                    part = part if part.shape[-1] == 1 else part[..., first:last]
                    seen = seen & (part != -xp.inf)
                if terms is not None:
                    seen = seen & (terms(start, stop, first, last) != -xp.inf)
                shape = (*seen.shape[:-2], stop - start, last - first)
                seen = xp.broadcast_to(seen, shape)
                total = total + xp.sum(xp.astype(seen, xp.int64), axis=-1)
            parts.append(
                total
                if self.keys
                else xp.zeros((stop - start,), dtype=xp.int64, device=self.device)
            )
        if not parts:
            return xp.zeros((0,), dtype=xp.int64, device=self.device)
        return xp.concat(parts, axis=-1)

    def _counts_by_position(self) -> Any:
        xp = self.xp
        ahead = self.support.ahead
        position = self.positions(0, self.rows)
        full = xp.full_like(position, self.keys)
        high = full if ahead == math.inf else self.prefix_counts(0, self.rows, int(ahead))
        low = xp.zeros_like(position)
        if self.support.left != math.inf:
            first = position - int(self.support.left)
            low = clip_integers(-(-first // self.scale), self.keys, xp)
        low = xp.minimum(low, high)
        if self.key_mask is None:
            return (high - low)[..., 0]
        real = xp.cumulative_sum(xp.astype(self.key_mask, xp.int64), axis=-1, include_initial=True)[
            ..., None, :
        ]
        shape = (*real.shape[:-1], self.rows)
        ends = [xp.broadcast_to(edge[..., 0], shape) for edge in (high, low)]
        high, low = (xp.take_along_axis(real, edge, axis=-1) for edge in ends)
        return high - low

    def first_prefix(self, start: int) -> int | None:
        """Return `prefix_counts` of query `start` as an int; None where positions are arrays."""
        if not self.static:
            return None
        return int(max(0, min((start + self.offset + 1) // self.scale, self.keys)))

    def first_later(self, start: int) -> int | None:
        """Return `later_rows` of the key `start` places before the last, or None, likewise."""
        if not self.static:
            return None
        end = (self.keys - start) * self.scale - 1
        return int(max(0, min(self.rows - (end - self.offset), self.rows)))

    def block(self, start: int, stop: int, first: int, last: int) -> Any:
        """Return which keys of ``first:last`` are visible to which queries of ``start:stop``.

        Returns
        -------
        bool array broadcastable to (*B, H, G, stop - start, last - first), or None
            None where all these keys are visible to all these queries.
        """
        parts = []
        if not self.whole(start, stop, first, last):
            parts.append(self.by_position(start, stop, first, last))
        if self.key_mask is not None:
            parts.append(self.key_mask[..., None, None, first:last])
        if self.mask is not None:
            parts.append(self.by_mask(start, stop, first, last))
        if self.runs is not None:
            runs = self.runs[..., None, None, :, None]
            keys = self.runs[..., None, None, None, first:last]
            parts.append(runs[..., start:stop, :] == keys)
        return all_of(parts)

    def by_position(self, start: int, stop: int, first: int, last: int) -> Any:
        """Return visibility by causal and window alone, (rows, keys) or (*B, 1, 1, rows, keys)."""
        xp = self.xp
        position = self.positions(start, stop)
        begin = xp.arange(first, last, dtype=xp.int64, device=self.device) * self.scale
        seen = None
        if self.support.ahead != math.inf:
            seen = begin + (self.scale - 1) <= position + int(self.support.ahead)
        if self.support.left != math.inf:
            near = begin >= position - int(self.support.left)
            seen = near if seen is None else seen & near
        return seen

    def by_mask(self, start: int, stop: int, first: int, last: int) -> Any:
        """Return visibility by the mask alone, which must allow all real keys of a window."""
        xp, scale = self.xp, self.scale
        rows, keys = self.mask.shape[-2:]
        part = self.mask
        if rows != 1:
            part = part[..., start:stop, :]
        if keys == 1:
            return part
        begin, end = first * scale, min(last * scale, self.length)
        part = part[..., begin:end]
        if scale == 1:
            return part
        denied = ~part
        if self.real is not None:
            real = self.real[..., None, None, None, begin:end]
            denied = denied & real
        # Transposed, since `windows` cuts rows; the zeros that it pads with deny nothing.
        grouped = windows(xp.matrix_transpose(denied), scale, xp=xp)
        return ~xp.matrix_transpose(xp.any(grouped, axis=-2))
