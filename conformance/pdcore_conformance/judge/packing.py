"""The ids of the packed sequences that the suite's calls have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["ids_of"]

Array = np.ndarray[Any, Any]


def ids_of(kind: str, lead: tuple[int, ...], rows: int, keys: int) -> tuple[Array, Array]:
    """Return the ids of queries (*B, N) and of keys (*B, M), see `Call.segments`.

    Every sequence has other lengths, and ids that neither ascend nor begin with 0.
    """
    of = {"ragged": _ragged, "equal": _equal, "padded": _padded, "pair": _pair}[kind]
    pairs = [of(rows, keys, shift) for shift in range(math.prod(lead))]
    q_ids, k_ids = (
        np.reshape(np.asarray([pair[i] for pair in pairs], np.int64), (*lead, n))
        for i, n in enumerate((rows, keys))
    )
    return q_ids, k_ids


def _runs(*runs: tuple[int, int]) -> list[int]:
    return [i for i, length in runs for _ in range(length)]


def _ragged(rows: int, keys: int, shift: int) -> tuple[list[int], list[int]]:
    """Return ids of three segments, of which the first two are short."""
    first, second = 2 + shift % 2, 1 + rows // 4
    ids = _runs((7, first), (2, second), (5, rows - first - second))
    return ids, ids


def _equal(rows: int, keys: int, shift: int) -> tuple[list[int], list[int]]:
    """Return ids of two segments of equal length, and what is left as padding."""
    ids = _runs((4, rows // 2), (1, rows // 2), (-1, rows % 2))
    return ids, ids


def _padded(rows: int, keys: int, shift: int) -> tuple[list[int], list[int]]:
    """Return ids of two segments with padding before, between and after them."""
    first = 1 + rows // 3 + shift % 2
    ids = _runs((-2, 1), (3, first), (-1, 1), (6, rows - first - 3), (-5, 1))
    return ids, ids


def _pair(rows: int, keys: int, shift: int) -> tuple[list[int], list[int]]:
    """Return ids of queries and keys of other lengths and another order."""
    first, second = rows // 3, 1 + shift % 2
    q_ids = _runs((0, first), (9, second), (4, rows - first - second - 1), (-1, 1))
    third = keys // 3
    k_ids = _runs((4, third), (-1, 1), (8, 2), (0, keys - third - 3))
    return q_ids, k_ids
