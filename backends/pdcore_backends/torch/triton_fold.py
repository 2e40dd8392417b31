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
from torch import Tensor

from pdcore.extend import UnsupportedError

from . import triton_kernels as kernels
from .prefix import beta_cotangent, plain_gradient

__all__ = ["fold"]

#: Elements of a tile, and tiles of a piece.
TILE, STEPS = 8192, 8
#: The most blocks of a grid along x.
BLOCKS = 2**31 - 1

Plain = Callable[..., tuple[Tensor, Tensor]]


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
    kernels.pieces[_grid(count * heads, pieces)](
        k,
        _bytes(real),
        means,
        m2s,
        counts,
        keys,
        heads,
        pieces,
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
    tiles_q = triton.cdiv(queries, rows)
    tiles = tiles_q * group + triton.cdiv(keys, rows)
    kernels.folded[_grid(count * heads, tiles)](
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
        tiles_q,
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
    tiles_q = triton.cdiv(queries, rows)
    pieces_q = triton.cdiv(tiles_q * group, STEPS)
    pieces = pieces_q + (triton.cdiv(keys, rows * STEPS) if split else 0)
    sums = k.new_empty(lead, heads, pieces, 2, width, dtype=torch.float32)
    learned, masked, places = isinstance(beta, Tensor), real is not None, k.stride()[:3]
    kernels.sums[_grid(lead * heads, pieces)](
        q,
        k,
        _bytes(real),
        *_weight(beta, heads, dim, mean, d_q, d_k, sums),
        group,
        queries,
        keys,
        heads,
        tiles_q,
        pieces,
        pieces_q,
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
    tiles_q = triton.cdiv(group * queries, rows)
    tiles = tiles_q + triton.cdiv(keys, rows)
    kernels.pulled[_grid(lead * heads, tiles)](
        k,
        _bytes(real),
        *_weight(beta, heads, dim, mean, inverse, count, d_q, d_k, sums, dq, dk, moved),
        group,
        queries,
        keys,
        heads,
        pieces,
        tiles,
        tiles_q,
        *places,
        dim,
        width,
        rows,
        split,
        masked,
        learned,
    )
    return dq, dk, beta_cotangent(moved, beta) if learned else None


def _grid(pairs: int, count: int) -> tuple[int]:
    """Return the grid of `count` programs for each pair, see `.triton_kernels`."""
    if pairs * count > BLOCKS:
        raise UnsupportedError(
            f"the fold of Attention-BN: got {pairs} pairs of a sequence and a key head, of {count} "
            f"blocks each, and a CUDA grid has {BLOCKS} blocks at most; pass fewer sequences a call"
        )
    return (pairs * count,)


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
