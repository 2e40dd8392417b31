"""Prefix statistics and their fold, chunk by chunk, so that a chunk stays in the cache.

Shapes as in `.fold`; row i stands at key i. The first real key is subtracted from all keys, so
that a mean far from 0 costs no digits. The sums of a chunk are relative to mean_b, the mean of the
n_b keys before the chunk: n_b (mean - mean_b)^2 is a part of the second moment, so the term that
cancels is at most n / n_b times the variance. Sums of the first chunk are relative to the first
real key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdcore.extend import first_real

from . import namespace as xp

__all__ = ["beta_cotangent", "fold_rows", "inverted", "plain_gradient"]

#: Keys of a chunk, by how many features all heads have at a key, so that a chunk fits the cache.
CHUNKS = ((2048, 64), (8192, 32))
LEAST = 16

Plain = Callable[..., tuple[Tensor, Tensor, Any]]


def fold_rows(
    q: Tensor,
    k: Tensor,
    real: Tensor | None,
    beta: Any,
    eps: float,
    closed: bool,
    plain: Plain,
    recorded: bool,
) -> tuple[Tensor, Tensor, Any]:
    """Fold prefix statistics, see `.fold.fold_prefix`; q has a row for each key.

    Parameters
    ----------
    q, k, real, beta, eps, closed
        As in `.fold.fold_prefix`, q and k in the accumulation dtype.
    plain : callable
        The same computation in differentiable calls, for gradients of gradients.
    recorded : bool
        Whether automatic differentiation records the call.
    """
    if recorded:
        folded, keys = _Rows.apply(q, k, real, beta, eps, closed, plain)
    else:
        folded, keys, *_ = _forward(q, k, real, beta, eps, closed, False)
    return folded, keys, None if real is None else real.cumsum(-1) > 0


def _chunk(k: Tensor) -> int:
    features = k.shape[0] * k.shape[1] * k.shape[3]
    return next((size for most, size in CHUNKS if features <= most), LEAST)


def _counts(real: Tensor | None, k: Tensor) -> Tensor:
    """Count the keys of every prefix, (M, 1) or (B, 1, M, 1)."""
    if real is None:
        return torch.arange(1, k.shape[2] + 1, dtype=k.dtype, device=k.device)[:, None]
    return real.cumsum(-1)[..., None].to(k.dtype)


def _forward(
    q: Tensor, k: Tensor, real: Tensor | None, beta: Any, eps: float, closed: bool, keep: bool
) -> tuple[Tensor, Tensor, Any, Any]:
    """Compute q' and k', and with `keep` each row's mean, less the first real key, and inverse.

    The inverse is 1 / (var + eps).
    """
    size, length = _chunk(k), k.shape[2]
    triangle = torch.ones(size, size, dtype=k.dtype, device=k.device).tril()
    counts = _counts(real, k)
    folded = torch.empty_like(q, memory_format=torch.contiguous_format)
    keys = torch.empty_like(k, memory_format=torch.contiguous_format)
    means, inverses = (torch.empty_like(keys) for _ in range(2)) if keep else (None, None)
    origin = k[:, :, :1] if real is None else first_real(k, real, xp=xp)
    mean_before, m2_before = (torch.zeros_like(origin) for _ in range(2))
    for start in range(0, length, size):
        cut = slice(start, min(start + size, length))
        n, rows = counts[..., cut, :], folded[:, :, :, cut]
        # A row of the product is the mean of the chunk's keys up to that row, for all keys before.
        tri = triangle[: n.shape[-2], : n.shape[-2]] / n.clamp_min(1.0)
        y = torch.sub(k[:, :, cut], origin, out=keys[:, :, cut]) - mean_before
        if real is not None:
            y = torch.where(real[:, :, cut, None], y, 0.0)
        away = tri @ y
        y.mul_(y)[:, :, :1] += m2_before  # the first key is in the sum of every row
        var = (tri @ y).addcmul_(away, away, value=-1.0).clamp_min_(0.0)
        m2_before = var[:, :, -1:] * n[..., -1:, :]
        inverse = inverted(var, eps)
        if closed:  # see `pdcore.lowering.Fold`
            inverse.mul_(n > 1)
        if means is not None and inverses is not None:
            torch.add(away, mean_before, out=means[:, :, cut])
            inverses[:, :, cut] = inverse
        last = away[:, :, -1:] + mean_before
        mean = away.add_(mean_before + origin)
        mean_before = last
        if isinstance(beta, Tensor):
            mean = beta * mean
        step = 1.0 if isinstance(beta, Tensor) else beta
        torch.sub(q[:, :, :, cut], mean[:, :, None], alpha=step, out=rows)
        rows.mul_(inverse[:, :, None])
    return folded, keys, means, inverses


def inverted(var: Tensor, eps: float) -> Tensor:
    """Return 1 / (var + eps); NaN, not 0, for a variance beyond the range of its dtype."""
    return (var + eps).reciprocal_().add(var, alpha=0.0)  # 0 times infinity is NaN


class _Rows(torch.autograd.Function):  # type: ignore[misc]
    """The fold with its gradient, chunk by chunk from the end; the shift c counts as a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        real: Tensor | None,
        beta: Any,
        eps: float,
        closed: bool,
        plain: Plain,
    ) -> tuple[Tensor, Tensor]:
        folded, keys, mean, inverse = _forward(q, k, real, beta, eps, closed, True)
        ctx.beta = None if isinstance(beta, Tensor) else beta
        ctx.rest = (eps, closed, plain)
        ctx.save_for_backward(q, k, real, beta if ctx.beta is None else None, mean, inverse)
        return folded, keys

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        q, k, real, learned, mean, inverse = ctx.saved_tensors
        beta = learned if ctx.beta is None else ctx.beta
        if torch.is_grad_enabled():
            eps, closed, plain = ctx.rest
            grads = plain_gradient(
                lambda q, k, beta: plain(q, k, real, beta, 0, eps=eps, closed=closed)[:2],
                q,
                k,
                beta,
                d,
            )
        else:
            grads = _pull_back(q, k, real, beta, mean, inverse, *d)
        return (grads[0], grads[1], None, grads[2], None, None, None)


def _pull_back(
    q: Tensor,
    k: Tensor,
    real: Tensor | None,
    beta: Any,
    mean: Tensor,
    inverse: Tensor,
    d_q: Tensor,
    d_k: Tensor,
) -> tuple[Tensor, Tensor, Any]:
    """Pull back as `Moments.prefix_vjp` does, by sums over the later rows."""
    size, length = _chunk(k), k.shape[2]
    triangle = torch.ones(size, size, dtype=k.dtype, device=k.device).triu()
    counts = _counts(real, k)
    shares = (1.0 / counts.clamp_min(1.0)).mul_(counts > 0)
    origin = k[:, :, :1] if real is None else first_real(k, real, xp=xp)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(k)
    levels, slopes = (torch.zeros_like(origin) for _ in range(2))
    moved = torch.zeros_like(origin) if isinstance(beta, Tensor) else None
    for start in range((length - 1) // size * size, -1, -size):
        cut = slice(start, min(start + size, length))
        share, steep, middle = shares[..., cut, :], inverse[:, :, cut], mean[:, :, cut]
        d = d_q[:, :, :, cut]
        row_sum = torch.mul(d, steep[:, :, None], out=dq[:, :, :, cut]).sum(2)
        whole = middle + origin
        turned = (d * (q[:, :, :, cut] - (beta * whole)[:, :, None])).sum(2)
        slope = turned.mul_(steep).mul_(steep).mul_(-2.0 * share)
        level = row_sum * (-beta * share) - slope * middle
        tri = triangle[: level.shape[2], : level.shape[2]]
        level, slope = (tri @ level).add_(levels), (tri @ slope).add_(slopes)
        levels, slopes = level[:, :, :1].clone(), slope[:, :, :1].clone()
        grad = level.addcmul_(slope, k[:, :, cut] - origin)
        if real is not None:
            grad = torch.where(real[:, :, cut, None], grad, 0.0)
        torch.add(d_k[:, :, cut], grad, out=dk[:, :, cut])
        if moved is not None:
            moved -= (row_sum * whole).sum(2, keepdim=True)
    return dq, dk, None if moved is None else beta_cotangent(moved, beta)


def beta_cotangent(total: Tensor, beta: Tensor) -> Tensor:
    """Sum a cotangent of beta, (B, H, 1, D), to the shape and dtype of beta."""
    d_beta = total.sum(0)
    return (d_beta if beta.shape[-1] != 1 else d_beta.sum(-1, keepdim=True)).to(beta.dtype)


def plain_gradient(
    plain: Callable[[Tensor, Tensor, Any], Any], q: Tensor, k: Tensor, beta: Any, d: Any
) -> tuple[Any, Any, Any]:
    """Compute the gradient of ``plain(q, k, beta) -> (q', k')`` in differentiable calls."""
    inputs = [q, k, *([beta] if isinstance(beta, Tensor) else [])]
    inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
    q, k, *rest = inputs
    results = plain(q, k, rest[0] if rest else beta)
    grads = torch.autograd.grad(results, inputs, d, create_graph=True, allow_unused=True)
    return grads[0], grads[1], grads[2] if rest else None
