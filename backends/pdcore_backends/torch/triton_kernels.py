"""The Triton kernels of `.triton_fold`: two forward, two backward.

Programs are numbered along x alone, as CUDA has at most 65,535 blocks along y and z: each pair of a
sequence and a key head has the same number of them, see `_place`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["folded", "pieces", "pulled", "sums"]


@triton.jit
def _merged(n, mean, m2, n_more, mean_more, m2_more):  # type: ignore[no-untyped-def]
    """Merge two states (n, mean, M2) by Chan's update."""
    both = n + n_more
    share = n_more / tl.maximum(both, 1.0)
    delta = mean_more - mean
    return both, mean + delta * share, m2 + m2_more + delta * delta * (n * share)


@triton.jit
def _place(count):  # type: ignore[no-untyped-def]
    """Return the pair of a program, and its number among the `count` programs of the pair."""
    program = tl.program_id(0)
    return (program // count).to(tl.int64), program % count


@triton.jit  # type: ignore[untyped-decorator]
def pieces(  # type: ignore[no-untyped-def]
    k,
    real,
    means,
    m2s,
    counts,
    keys,
    heads,
    pieces,
    at_b,
    at_h,
    at_n,
    dim: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    steps: tl.constexpr,
    masked: tl.constexpr,
):
    """Compute the state (n, mean, M2) of one piece of the keys of one head."""
    pair, piece = _place(pieces)
    b, h = pair // heads, pair % heads
    d = tl.arange(0, width)
    n = 0.0
    mean = tl.zeros([width], tl.float32)
    m2 = tl.zeros([width], tl.float32)
    for step in range(steps):
        row = (piece * steps + step) * rows + tl.arange(0, rows)
        keep = row < keys
        if masked:
            keep = keep & (tl.load(real + b * keys + row, mask=keep, other=0) != 0)
        at = k + b * at_b + h * at_h + row[:, None].to(tl.int64) * at_n + d[None, :]
        x = tl.load(at, mask=keep[:, None] & (d[None, :] < dim), other=0.0).to(tl.float32)
        more = tl.sum(keep.to(tl.float32), 0)
        share = 1.0 / tl.maximum(more, 1.0)
        first = tl.sum(x, 0) * share
        away = tl.where(keep[:, None], x - first[None, :], 0.0)
        # The rounding error of the first mean.
        rest = tl.sum(away, 0) * share
        square = tl.sum(away * away, 0) - more * rest * rest
        n, mean, m2 = _merged(n, mean, m2, more, first + rest, square)
    place = pair * pieces + piece
    tl.store(counts + place, n)
    tl.store(means + place * width + d, mean)
    tl.store(m2s + place * width + d, m2)


@triton.jit  # type: ignore[untyped-decorator]
def folded(  # type: ignore[no-untyped-def]
    q,
    k,
    beta,
    means,
    m2s,
    counts,
    q_out,
    k_out,
    mean_out,
    inverse_out,
    count_out,
    number,
    eps,
    group,
    queries,
    keys,
    heads,
    pieces,
    tiles,
    tiles_q,
    q_b,
    q_h,
    q_g,
    q_n,
    at_b,
    at_h,
    at_n,
    dim: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    split: tl.constexpr,
    learned: tl.constexpr,
):
    """Merge the states of one head, and fold them into a tile of queries or keys."""
    pair, tile = _place(tiles)
    b, h = pair // heads, pair % heads
    d = tl.arange(0, width)
    n = 0.0
    mean = tl.zeros([width], tl.float32)
    m2 = tl.zeros([width], tl.float32)
    for piece in range(pieces):
        place = pair * pieces + piece
        n, mean, m2 = _merged(
            n,
            mean,
            m2,
            tl.load(counts + place),
            tl.load(means + place * width + d),
            tl.load(m2s + place * width + d),
        )
    var = m2 / tl.maximum(n, 1.0)
    var = tl.where(var == float("inf"), float("nan"), var)
    inverse = tl.where(n > 1.0, 1.0 / (var + eps), 0.0)
    factor = inverse
    if split:
        factor = tl.sqrt(inverse)
    if tile == 0:
        tl.store(count_out + pair, n)
        tl.store(mean_out + pair * dim + d, mean, mask=d < dim)
        tl.store(inverse_out + pair * dim + d, inverse, mask=d < dim)
    if tile < tiles_q * group:
        g, row = tile // tiles_q, (tile % tiles_q) * rows + tl.arange(0, rows)
        inside = (row[:, None] < queries) & (d[None, :] < dim)
        at = q + b * q_b + h * q_h + g * q_g + row[:, None].to(tl.int64) * q_n + d[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if learned:
            weight = tl.load(beta + h * dim + d, mask=d < dim, other=0.0)
        else:
            weight = tl.zeros([width], tl.float32) + number
        y = (x - (weight * mean)[None, :]) * factor[None, :]
        to = q_out + ((pair * group + g) * queries + row[:, None].to(tl.int64)) * dim + d[None, :]
        tl.store(to, y.to(q_out.dtype.element_ty), mask=inside)
    else:
        row = (tile - tiles_q * group) * rows + tl.arange(0, rows)
        inside = (row[:, None] < keys) & (d[None, :] < dim)
        at = k + b * at_b + h * at_h + row[:, None].to(tl.int64) * at_n + d[None, :]
        y = tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if split:
            y = y * factor[None, :]
        to = k_out + (pair * keys + row[:, None].to(tl.int64)) * dim + d[None, :]
        tl.store(to, y.to(k_out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def sums(  # type: ignore[no-untyped-def]
    q,
    k,
    real,
    beta,
    mean_in,
    d_q,
    d_k,
    sums,
    number,
    group,
    queries,
    keys,
    heads,
    tiles_q,
    pieces,
    pieces_q,
    q_b,
    q_h,
    q_g,
    q_n,
    at_b,
    at_h,
    at_n,
    dim: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    steps: tl.constexpr,
    masked: tl.constexpr,
    learned: tl.constexpr,
):
    """Sum d_q', d_q' (q - beta mean) over a piece of the queries, or d_k' (k - mean) of keys."""
    pair, piece = _place(pieces)
    b, h = pair // heads, pair % heads
    d = tl.arange(0, width)
    mean = tl.load(mean_in + pair * dim + d, mask=d < dim, other=0.0)
    level = tl.zeros([width], tl.float32)
    slope = tl.zeros([width], tl.float32)
    if piece < pieces_q:
        if learned:
            weight = tl.load(beta + h * dim + d, mask=d < dim, other=0.0)
        else:
            weight = tl.zeros([width], tl.float32) + number
        for step in range(steps):
            tile = piece * steps + step
            g, row = tile // tiles_q, (tile % tiles_q) * rows + tl.arange(0, rows)
            last = tl.where(g < group, queries, 0)
            inside = (row[:, None] < last) & (d[None, :] < dim)
            at = q + b * q_b + h * q_h + g * q_g + row[:, None].to(tl.int64) * q_n + d[None, :]
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32) - (weight * mean)[None, :]
            of = ((pair * group + g) * queries + row[:, None].to(tl.int64)) * dim + d[None, :]
            dq = tl.load(d_q + of, mask=inside, other=0.0).to(tl.float32)
            level += tl.sum(dq, 0)
            slope += tl.sum(dq * x, 0)
    else:
        for step in range(steps):
            row = ((piece - pieces_q) * steps + step) * rows + tl.arange(0, rows)
            keep = row < keys
            if masked:
                keep = keep & (tl.load(real + b * keys + row, mask=keep, other=0) != 0)
            inside = keep[:, None] & (d[None, :] < dim)
            at = k + b * at_b + h * at_h + row[:, None].to(tl.int64) * at_n + d[None, :]
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
            of = (pair * keys + row[:, None].to(tl.int64)) * dim + d[None, :]
            dk = tl.load(d_k + of, mask=inside, other=0.0).to(tl.float32)
            slope += tl.sum(dk * x, 0)
    place = (pair * pieces + piece) * 2
    tl.store(sums + place * width + d, level)
    tl.store(sums + (place + 1) * width + d, slope)


@triton.jit  # type: ignore[untyped-decorator]
def pulled(  # type: ignore[no-untyped-def]
    k,
    real,
    beta,
    mean_in,
    inverse_in,
    count_in,
    d_q,
    d_k,
    sums,
    q_out,
    k_out,
    moved_out,
    number,
    group,
    queries,
    keys,
    heads,
    pieces,
    tiles,
    tiles_q,
    at_b,
    at_h,
    at_n,
    dim: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    split: tl.constexpr,
    masked: tl.constexpr,
    learned: tl.constexpr,
):
    """Compute the gradient of a tile of queries or keys."""
    pair, tile = _place(tiles)
    b, h = pair // heads, pair % heads
    d = tl.arange(0, width)
    inverse = tl.load(inverse_in + pair * dim + d, mask=d < dim, other=0.0)
    factor = inverse
    if split:
        factor = tl.sqrt(inverse)
    if tile < tiles_q:
        row = tile * rows + tl.arange(0, rows)
        inside = (row[:, None] < group * queries) & (d[None, :] < dim)
        of = (pair * group * queries + row[:, None].to(tl.int64)) * dim + d[None, :]
        dq = tl.load(d_q + of, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
        tl.store(q_out + of, dq.to(q_out.dtype.element_ty), mask=inside)
    else:
        level = tl.zeros([width], tl.float32)
        slope = tl.zeros([width], tl.float32)
        for piece in range(pieces):
            place = (pair * pieces + piece) * 2
            level += tl.load(sums + place * width + d)
            slope += tl.load(sums + (place + 1) * width + d)
        mean = tl.load(mean_in + pair * dim + d, mask=d < dim, other=0.0)
        if learned:
            weight = tl.load(beta + h * dim + d, mask=d < dim, other=0.0)
        else:
            weight = tl.zeros([width], tl.float32) + number
        count = tl.maximum(tl.load(count_in + pair), 1.0)
        moved = factor * level
        if split:
            d_var = -0.5 * factor * inverse * slope
        else:
            d_var = -inverse * inverse * slope
        if tile == tiles_q:
            tl.store(moved_out + pair * dim + d, -mean * moved, mask=d < dim)
        row = (tile - tiles_q) * rows + tl.arange(0, rows)
        keep = row < keys
        inside = keep[:, None] & (d[None, :] < dim)
        if masked:
            keep = keep & (tl.load(real + b * keys + row, mask=keep, other=0) != 0)
        at = k + b * at_b + h * at_h + row[:, None].to(tl.int64) * at_n + d[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        more = (2.0 / count * d_var)[None, :] * x - (weight * moved / count)[None, :]
        of = (pair * keys + row[:, None].to(tl.int64)) * dim + d[None, :]
        dk = tl.load(d_k + of, mask=inside, other=0.0).to(tl.float32)
        if split:
            dk = dk * factor[None, :]
        dk = dk + tl.where(keep[:, None], more, 0.0)
        tl.store(k_out + of, dk.to(k_out.dtype.element_ty), mask=inside)
