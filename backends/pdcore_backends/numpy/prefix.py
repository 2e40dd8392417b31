"""The mean and variance of every prefix of the keys, by cumulative sums.

One more key moves the mean to that of the sums, and adds delta^2 (n - 1) / n to the centred second
moment, where delta is the key less the mean before it (Welford, 1962). So both are cumulative sums,
of keys relative to a point near them, and of terms that are never negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from pdcore.extend import Moments, Statistics, overflow_as_nan

from . import threads

__all__ = ["prefix_moments"]

_ELEMENTS = 2**17  # entries of the keys that are computed at once, and so stay in the caches
_CHUNK = 32  # rows that are summed one after the other, in all chunks at once


def prefix_moments(stats: Statistics, keys: Any, mask: Any, origin: Any) -> Mapping[str, Any]:
    """Compute the finalised statistics of every prefix of the keys, the empty one included.

    Parameters
    ----------
    stats : Mean or Moments
        The statistic.
    keys : array (*B, H, M, D)
        Keys.
    mask : bool array broadcastable to (*B, H, M, 1), or None
        True for a real key.
    origin : array (*B, H, 1, D)
        A point near the keys: the first real key of each head.

    Returns
    -------
    mapping
        ``n`` (*B, H, M + 1, 1), and ``mean`` and, of `Moments`, ``var`` (*B, H, M + 1, D).
    """
    *lead, length, dim = keys.shape
    shape = (*lead, length + 1, dim)
    count = math.prod(lead)
    real = None
    n = np.arange(length + 1, dtype=keys.dtype)[:, None]
    if mask is not None:
        real = np.broadcast_to(mask, (*lead, length, 1)).astype(keys.dtype)
        n = np.zeros((*lead, length + 1, 1), keys.dtype)
        np.cumsum(real, axis=-2, out=n[..., 1:, :])
        real = real.reshape(count, length, 1)
    counts = n.reshape(-1, length + 1, 1)
    names = ("mean", "var") if type(stats) is Moments else ("mean",)
    result = {name: np.zeros((count, length + 1, dim), keys.dtype) for name in names}
    keys, origin = keys.reshape(count, length, dim), origin.reshape(count, 1, dim)

    def run(at: slice) -> None:
        seen = None if real is None else real[at]
        part = {name: x[at] for name, x in result.items()}
        _fill(keys[at], seen, counts if real is None else counts[at], origin[at], part)

    size = max(1, _ELEMENTS // max(1, length * dim))
    parts = [slice(a, min(a + size, count)) for a in range(0, count, size)]
    threads.run(run, parts, threads.count(small=len(parts) == 1))
    # A variance beyond its range is NaN, as by `Statistics.finalize`; a mean alone likewise.
    if not np.isfinite(result[names[-1]]).all():
        result[names[-1]] = overflow_as_nan(result[names[-1]], xp)
    finals = {name: x.reshape(shape) for name, x in result.items()}
    return {"n": np.broadcast_to(n, (*shape[:-1], 1)), **finals}


def _fill(keys: Any, real: Any, n: Any, origin: Any, result: Mapping[str, Any]) -> None:
    """Fill the results of some heads, which are zeros."""
    share = 1 / np.maximum(n[:, 1:], 1)
    x = keys - origin
    if real is not None:
        x *= real
    mean = result["mean"]
    mean[:, 1:] = x
    _accumulate(mean[:, 1:])
    mean[:, 1:] *= share
    if "var" in result:
        x -= mean[:, :-1]
        x *= x
        x *= n[:, :-1] * share if real is None else n[:, :-1] * share * real
        _accumulate(x)
        np.multiply(x, share, out=result["var"][:, 1:])
    mean += origin


def _accumulate(x: Any) -> None:
    """Replace rows (P, M, D) by their cumulative sums; `np.cumsum` takes four times as long."""
    heads, length, dim = x.shape
    whole = length - length % _CHUNK
    chunks = x[:, :whole].reshape(heads, -1, _CHUNK, dim)  # a view, as one axis is split
    for i in range(1, _CHUNK):
        chunks[:, :, i] += chunks[:, :, i - 1]
    for i in range(1, chunks.shape[1]):
        chunks[:, i] += chunks[:, i - 1, -1:]
    for i in range(max(whole, 1), length):
        x[:, i] += x[:, i - 1]
