"""Attention-BN folded into the query by Triton: two kernels forward, two backward.

Shapes as in `.fold`. The first kernel computes the moments of pieces of the keys: those of a tile
by two passes in registers, those of a piece by Chan's merge of its tiles, so that a mean far from
0 costs no digits. The second kernel merges the pieces and folds. No sum uses atomic additions, so
results do not change from run to run. The module is imported only to fold CUDA tensors, since it
needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .prefix import beta_cotangent, plain_gradient

__all__ = ["fold"]

#: Elements of a tile, and tiles of a piece.
TILE, STEPS = 8192, 8

Plain = Callable[..., tuple[Tensor, Tensor]]


@triton.jit
def _merged(n, mean, m2, n_more, mean_more, m2_more):  # type: ignore[no-untyped-def]
    """Merge two states (n, mean, M2) by Chan's update."""
    both = n + n_more
    share = n_more / tl.maximum(both, 1.0)
    delta = mean_more - mean
    return both, mean + delta * share, m2 + m2_more + delta * delta * (n * share)


@triton.jit  # type: ignore[untyped-decorator]
def _pieces(  # type: ignore[no-untyped-def]
    k,
    real,
    means,
    m2s,
    counts,
    keys,
    heads,
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
    pair = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
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
    place = pair * tl.num_programs(1) + piece
    tl.store(counts + place, n)
    tl.store(means + place * width + d, mean)
    tl.store(m2s + place * width + d, m2)


@triton.jit  # type: ignore[untyped-decorator]
def _folded(  # type: ignore[no-untyped-def]
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
    pair = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
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
def _sums(  # type: ignore[no-untyped-def]
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
    pair = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
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
    place = (pair * tl.num_programs(1) + piece) * 2
    tl.store(sums + place * width + d, level)
    tl.store(sums + (place + 1) * width + d, slope)


@triton.jit  # type: ignore[untyped-decorator]
def _pulled(  # type: ignore[no-untyped-def]
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
    pair = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
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


def fold(
    q: Tensor,
    k: Tensor,
    real: Tensor | None,
    beta: Any,
    eps: float,
    split: bool,
    plain: Plain,
    recorded: bool,
) -> tuple[Tensor, Tensor]:
    """Fold the statistics of a sequence, see `.fold.fold`.

    Parameters
    ----------
    q, k, real, beta, eps, split
        As in `.fold.fold`, for calls that `.device.unfolded` gives no reason against.
    plain : callable
        ``plain(q, k, real, beta, eps, split, over_batch)`` in differentiable calls, for gradients
        of gradients.
    recorded : bool
        Whether automatic differentiation records the call.
    """
    if recorded:
        rows: tuple[Tensor, Tensor] = _Fold.apply(q, k, real, beta, eps, split, plain)
        return rows
    folded, keys, *_ = _forward(q, k, real, beta, eps, split)
    return folded, keys


class _Fold(torch.autograd.Function):  # type: ignore[misc]
    """The fold with its gradient; the shift c counts as a constant, which changes no result."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        real: Tensor | None,
        beta: Any,
        eps: float,
        split: bool,
        plain: Plain,
    ) -> tuple[Tensor, Tensor]:
        folded, keys, mean, inverse, count = _forward(q, k, real, beta, eps, split)
        ctx.beta = None if isinstance(beta, Tensor) else beta
        ctx.rest = (eps, split, plain)
        ctx.save_for_backward(q, k, real, beta if ctx.beta is None else None, mean, inverse, count)
        return folded, keys

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        q, k, real, learned, mean, inverse, count = ctx.saved_tensors
        eps, split, plain = ctx.rest
        beta = learned if ctx.beta is None else ctx.beta
        if torch.is_grad_enabled():
            grads = plain_gradient(
                lambda q, k, beta: plain(q, k, real, beta, eps, split, False), q, k, beta, d
            )
        else:
            grads = _backward(q, k, real, beta, split, mean, inverse, count, *d)
        return (grads[0], grads[1], None, grads[2], None, None, None)


def _forward(
    q: Tensor, k: Tensor, real: Tensor | None, beta: Any, eps: float, split: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute q', k', mean and 1 / (var + eps), (B, H, 1, D), and the number of keys (B, H)."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    count, heads, group, queries, dim = q.shape
    keys, width, rows = k.shape[2], triton.next_power_of_2(dim), _rows(dim)
    pieces = triton.cdiv(keys, rows * STEPS)
    means, m2s = (k.new_empty(count, heads, pieces, width, dtype=torch.float32) for _ in range(2))
    counts = k.new_empty(count, heads, pieces, dtype=torch.float32)
    _pieces[(count * heads, pieces)](
        k,
        _bytes(real),
        means,
        m2s,
        counts,
        keys,
        heads,
        *k.stride()[:3],
        dim,
        width,
        rows,
        STEPS,
        real is not None,
    )
    folded, shifted = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    mean, inverse = (k.new_empty(count, heads, 1, dim, dtype=torch.float32) for _ in range(2))
    number = k.new_empty(count, heads, dtype=torch.float32)
    tiles = triton.cdiv(queries, rows)
    _folded[(count * heads, tiles * group + triton.cdiv(keys, rows))](
        q,
        k,
        *_weight(beta, heads, dim, means, m2s, counts, folded, shifted, mean, inverse, number),
        eps,
        group,
        queries,
        keys,
        heads,
        pieces,
        tiles,
        *q.stride()[:4],
        *k.stride()[:3],
        dim,
        width,
        rows,
        split,
        isinstance(beta, Tensor),
    )
    return folded, shifted, mean, inverse, number


def _backward(
    q: Tensor,
    k: Tensor,
    real: Tensor | None,
    beta: Any,
    split: bool,
    mean: Tensor,
    inverse: Tensor,
    count: Tensor,
    d_q: Tensor,
    d_k: Tensor,
) -> tuple[Tensor, Tensor, Any]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    d_q, d_k = d_q.contiguous(), d_k.contiguous()
    lead, heads, group, queries, dim = q.shape
    keys, width, rows = k.shape[2], triton.next_power_of_2(dim), _rows(dim)
    tiles = triton.cdiv(queries, rows)
    of_queries = triton.cdiv(tiles * group, STEPS)
    pieces = of_queries + (triton.cdiv(keys, rows * STEPS) if split else 0)
    sums = k.new_empty(lead, heads, pieces, 2, width, dtype=torch.float32)
    learned, masked, places = isinstance(beta, Tensor), real is not None, k.stride()[:3]
    _sums[(lead * heads, pieces)](
        q,
        k,
        _bytes(real),
        *_weight(beta, heads, dim, mean, d_q, d_k, sums),
        group,
        queries,
        keys,
        heads,
        tiles,
        of_queries,
        *q.stride()[:4],
        *places,
        dim,
        width,
        rows,
        STEPS,
        masked,
        learned,
    )
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    moved = torch.empty_like(mean)
    tiles = triton.cdiv(group * queries, rows)
    _pulled[(lead * heads, tiles + triton.cdiv(keys, rows))](
        k,
        _bytes(real),
        *_weight(beta, heads, dim, mean, inverse, count, d_q, d_k, sums, dq, dk, moved),
        group,
        queries,
        keys,
        heads,
        pieces,
        tiles,
        *places,
        dim,
        width,
        rows,
        split,
        masked,
        learned,
    )
    return dq, dk, beta_cotangent(moved, beta) if learned else None


def _rows(dim: int) -> int:
    width: int = triton.next_power_of_2(dim)
    return max(16, TILE // width)


def _bytes(real: Tensor | None) -> Tensor | None:
    return None if real is None else real.contiguous().view(torch.uint8)


def _weight(beta: Any, heads: int, dim: int, *arrays: Tensor) -> tuple[Any, ...]:
    """Return kernel arguments with beta as an array (H, D) in front, or as a number behind."""
    if not isinstance(beta, Tensor):
        return (None, *arrays, float(beta))
    whole = beta.to(torch.float32).reshape(heads, -1).expand(heads, dim).contiguous()
    return (whole, *arrays, 0.0)
