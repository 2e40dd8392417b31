"""The compiled code: softmax attention in one pass over the keys, block by block.

NumPy takes a pass over memory for every step: the product, the maximum, the exponential, the sum,
the second product. Here a block of scores stays in the cache for all steps, and the exponential,
which takes most of the time besides the products, is a polynomial that the compiler vectorises.
The products are calls of the BLAS, to which Numba compiles `numpy.dot`: a loop would be slower.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int64, njit, prange, types, void

__all__ = ["attend"]

#: What the compiler may do with floating-point numbers: contract a * b + c, reorder sums, multiply
#: by a reciprocal, ignore the sign of 0. It must not assume that NaN and infinity never occur: a
#: NaN has to reach every row that sees it, and -inf hides a key.
ALLOWED = {"contract", "reassoc", "arcp", "nsz"}

#: Queries and keys of a block: 128 x 256 scores are 128 KiB, and fit the second-level cache.
ROWS, KEYS = 128, 256


@njit(fastmath=ALLOWED)
def exp(x):  # type: ignore[no-untyped-def]
    """Compute exp of a float32 up to 0, within 3 units in the last place; 0 below -87.

    x = n log 2 + r with |r| <= log(2) / 2, log 2 in two parts so that r is exact; exp(r) by the
    polynomial of Cephes (S. Moshier), and 2^n by the exponent bits.
    """
    clipped = np.float32(-87.0) if x < np.float32(-87.0) else x  # NaN compares False and stays
    n = np.floor(clipped * np.float32(1.4426950408889634) + np.float32(0.5))
    r = clipped - n * np.float32(0.693145751953125)
    r = r - n * np.float32(1.42860682030941723212e-6)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0.0) if x < np.float32(-87.0) else p * power


@njit(fastmath=ALLOWED)
def highest(scores, peak):  # type: ignore[no-untyped-def]
    """Return the maximum of a row of scores and `peak`, ignoring NaN."""
    # The range starts at the constant 0: an index that might be negative is not vectorised.
    for j in range(scores.shape[0]):
        peak = max(peak, scores[j])
    return peak


@njit(fastmath=ALLOWED)
def weigh(scores, peak):  # type: ignore[no-untyped-def]
    """Turn a row of scores into weights relative to a maximum, and sum them."""
    total = np.float32(0.0)
    for j in range(scores.shape[0]):
        weight = exp(scores[j] - peak)
        scores[j] = weight
        total += weight
    return total


# Read-only, so that writable arrays are accepted too. With these types `attend` is compiled once,
# when the backend is loaded, and not during a user's call.
_ROWS = types.Array(float32, 3, "C", readonly=True)
_ROW = types.Array(float32, 2, "C", readonly=True)
_SPAN = types.Array(int64, 2, "C", readonly=True)


@njit(
    void(
        _ROWS,
        _ROWS,
        _ROWS,
        _ROW,
        _SPAN,
        _SPAN,
        float32,
        int64,
        int64,
        float32[:, :, ::1],
        float32[:, ::1],
    ),
    parallel=True,
    nogil=True,
    fastmath=ALLOWED,
    cache=True,
)
def attend(q, k, v, key_bias, low, high, scale, group, sequence, out, level):  # type: ignore[no-untyped-def]
    """Compute softmax attention and the log of the summed weights.

    Parameters
    ----------
    q : float32 array (C, N, D)
        Queries; C is the number of all query heads of all sequences.
    k, v : float32 array (C / group, M, D), (C / group, M, Dv)
        Keys and values, finite where `key_bias` is -inf.
    key_bias : float32 array (C / group, M) or (0, 0)
        Added to the scores.
    low, high : int64 array (S, N)
        The keys low:high that a query sees by position; S sequences, or 1 for all.
    scale : float32
        The factor of the inner products.
    group : int
        Query heads of one key head.
    sequence : int
        Query heads of one sequence.
    out : float32 array (C, N, Dv)
        Written.
    level : float32 array (C, N)
        Written: -inf where a query sees no key.
    """
    cells, length = q.shape[:2]
    keys, value_dim = v.shape[1], v.shape[2]
    blocks = (length + ROWS - 1) // ROWS
    for task in prange(cells * blocks):
        # Under causal the last rows see the most keys: start with them, so that no thread
        # finishes long after the others.
        cell, start = task % cells, (blocks - 1 - task // cells) * ROWS
        stop = min(start + ROWS, length)
        place = cell // sequence if low.shape[0] > 1 else 0
        first, last = low[place, start], high[place, start]
        for i in range(start, stop):
            first, last = min(first, low[place, i]), max(last, high[place, i])
        rows = stop - start
        block = q[cell, start:stop] * scale
        summed = np.zeros((rows, value_dim), np.float32)
        total = np.zeros(rows, np.float32)
        peak = np.full(rows, -np.inf, np.float32)
        # On a grid that does not depend on the rows, so that a row's result does not either.
        for begin in range(first // KEYS * KEYS, last, KEYS):
            end = min(begin + KEYS, keys)
            scores = np.dot(block, k[cell // group, begin:end].T)
            for i in range(rows):
                a = min(max(low[place, start + i], begin), end) - begin
                b = max(min(high[place, start + i], end) - begin, a)
                if key_bias.shape[0] > 0:
                    for j in range(a, b):
                        scores[i, j] += key_bias[cell // group, begin + j]
                scores[i, :a] = 0.0
                scores[i, b:] = 0.0
                most = highest(scores[i, a:b], peak[i])
                # No key, or keys of weight 0 only: exp(-inf - -inf) would be NaN.
                base = most if most > -np.inf else np.float32(0.0)
                shrink = exp(peak[i] - base)
                total[i] = total[i] * shrink + weigh(scores[i, a:b], base)
                peak[i] = most
                if shrink != 1.0:
                    summed[i] *= shrink
            summed += np.dot(scores, v[cell // group, begin:end])
        for i in range(rows):
            if total[i] == 0.0:
                out[cell, start + i] = 0.0
                level[cell, start + i] = -np.inf
            else:
                out[cell, start + i] = summed[i] / total[i]
                base = peak[i] if peak[i] > -np.inf else np.float32(0.0)
                level[cell, start + i] = base + np.log(total[i])
