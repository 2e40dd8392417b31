"""The stream of dropout by its definition: 32-bit words in NumPy's unsigned integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["keeps", "random_words"]

Words = Any  # arrays of uint32

GOLDEN = np.uint32(0x9E3779B9)


def _lowbias32(x: Words) -> Words:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def random_words(seed: int, head: Any, i: Any, j: Any) -> Words:
    """Compute u32(seed, b h, i, j), uint32.

    Parameters
    ----------
    seed : int
        From 0 to 2^64 - 1.
    head, i, j : int or integer array
        b h, and the indices of the query and of the key, below 2^32 and broadcastable.
    """
    head, i, j = (np.asarray(x, np.uint32)[None] for x in (head, i, j))
    lanes = []
    with np.errstate(over="ignore"):
        for lane in (0x243F6A88, 0x85A308D3):
            h = np.full(1, lane, np.uint32)
            for word in (seed % 2**32, seed // 2**32):
                h = _lowbias32(h ^ np.uint32(word)) + GOLDEN
            h = _lowbias32(h.reshape((1,) * head.ndim) ^ head) + GOLDEN
            lanes.append(_lowbias32(h ^ i))
        x = lanes[0] + j * GOLDEN
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = ((x ^ (x >> np.uint32(15))) + lanes[1]) * np.uint32(0x846CA68B)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x9E3779B1)
        return (x ^ (x >> np.uint32(15)))[0]


def keeps(p: float, seed: int, head: Any, rows: int, keys: Words) -> Words:
    """Return which weights are kept, bool (*head, rows, keys).

    Parameters
    ----------
    p : float
        The probability that a weight is dropped.
    seed : int
    head : integer array
        The indices b h.
    rows : int
        The number of queries.
    keys : integer array
        The index of each key; of a pooled key, that of the first position of its window.
    """
    least = min(math.ceil(p * 2.0**32), 2**32 - 1)
    words = random_words(
        seed, np.asarray(head)[..., None, None], np.arange(rows)[:, None], np.asarray(keys)
    )
    return words >= np.uint32(least)
