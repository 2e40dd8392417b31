"""Ranges of positions, and arrays cut by them along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

__all__ = ["Cut", "Span", "all_ranges", "entries", "power_of_two", "split", "tiles"]

#: A range of positions: the sequence, the first position, and the number of positions.
Span = tuple[int, int, int]


def power_of_two(n: int) -> int:
    """Return the least power of two from n on, at least 8; 0 for 0."""
    return n and max(8, 1 << (n - 1).bit_length())


def all_ranges(spans: Sequence[Span], length: int) -> list[tuple[int, int, bool]]:
    """Return (start, length, whether it is a gap) for all of 0..length, empty spans left out."""
    whole, done = [], 0
    for _, start, count in sorted(spans):
        if count:
            if done < start:
                whole.append((done, start - done, True))
            whole.append((start, count, False))
            done = start + count
    if done < length or not whole:
        whole.append((done, length - done, True))
    return whole


def tiles(spans: Sequence[Span], sequences: int) -> tuple[int, int, int]:
    """Return the start, number and length of spans that follow one another alike in all sequences.

    The number is 0 for other spans.
    """
    _, start, length = spans[0]
    count = len(spans) // sequences
    alike = [(s, start + i * length, length) for s in range(sequences) for i in range(count)]
    return start, count if length and list(spans) == alike else 0, length


def split(x: Any, sizes: Sequence[int], axis: int) -> Sequence[Any]:
    """Split an array into parts of the given sizes along an axis.

    By one call where the array has that, as those of PyTorch do: the gradient of a slice is an
    array as large as the whole.
    """
    if hasattr(x, "split"):
        parts: Sequence[Any] = x.split(list(sizes), axis)
        return parts
    ends = accumulate(sizes)
    return [entries(x, end - n, end, axis) for end, n in zip(ends, sizes, strict=True)]


class Cut:
    """Sequences x[s] cut along an axis of theirs into spans and the gaps between them.

    All of a sequence is split at once: the gradient of one span alone is an array as large as the
    whole.

    Parameters
    ----------
    x : array (sequences, ...)
    spans : sequence of Span
        All spans that are asked for, each in one run with its neighbours.
    axis : int
        The axis of x[s].
    xp : namespace
        The array-API namespace of `x`.
    """

    def __init__(self, x: Any, spans: Sequence[Span], axis: int, *, xp: Any) -> None:
        self.x, self._spans, self._axis, self._xp = x, spans, axis, xp
        self._parts: dict[Span, Any] = {}

    def of(self, spans: Sequence[Span]) -> list[Any]:
        """Return the parts of some spans."""
        if not self._parts:
            self._split()
        return [self._parts[span] for span in spans]

    def _split(self) -> None:
        places: dict[int, list[Span]] = {}
        for span in self._spans:
            places.setdefault(span[0], []).append(span)
        sequences = self._xp.unstack(self.x, axis=0)
        for s, found in places.items():
            whole = all_ranges(found, self.x.shape[self._axis + 1])
            pieces = split(sequences[s], [n for _, n, _ in whole], self._axis)
            parts = zip(whole, pieces, strict=True)
            self._parts.update(((s, a, n), x) for (a, n, _), x in parts)
            nothing = entries(sequences[s], 0, 0, self._axis)
            self._parts.update((span, nothing) for span in found if not span[2])


def entries(x: Any, start: int, stop: int, axis: int) -> Any:
    """Return the entries start..stop along an axis; the array itself where those are all."""
    if not start and stop == x.shape[axis]:
        return x
    return x[(*(slice(None),) * axis, slice(start, stop), ...)]
