"""Attention-BN without division: a mean, and queries less its multiple, for the keys as they are.

Shapes as in `.fold`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdcore.extend import first_real, overflow_as_nan

from . import namespace as xp
from .flash import recorded
from .fold import prefix_moments, row_of_ones

__all__ = ["mean_of_keys", "prefix_means", "recentred"]


def recentred(
    q: Tensor, k: Tensor, real: Tensor | None, mean: Tensor, beta: Any, *, of: str
) -> tuple[Tensor, Tensor]:
    """Compute q - beta mean, and the keys or keys near 0, see `pdcore.lowering.Recentre`.

    The kernel reads the keys as they are where that costs no digits. Where it does, all keys are
    shifted by one point: a gradient of q sums multiples of the keys that nearly cancel; keys that
    were pooled are yet to be rounded; and T by running statistics has no rounding error of a mean
    which would hide that of scores far from 0.

    Parameters
    ----------
    q, k, real, beta
        As in `.fold.fold`.
    mean : Tensor (B, H, 1, D) or (H, 1, D), or (B, H, N, D) for prefixes
        In the accumulation dtype.
    of : {"sequence", "batch", "running", "prefix"}
        The keys of the mean.

    Returns
    -------
    q', k' : Tensor
        In the dtype of q.
    """
    dtype, centre = q.dtype, (beta * mean)[..., None, :, :]
    moved = q.to(centre.dtype) - centre
    learned = beta if isinstance(beta, Tensor) else None
    if of == "running" or k.dtype != dtype or recorded(q, k, learned):
        point = first_real(k, real, xp=xp) if of == "prefix" else mean
        k = k.to(mean.dtype) - point.detach()
    return moved.to(dtype), k.to(dtype)


def mean_of_keys(k: Tensor, real: Tensor | None, *, over_batch: bool) -> Tensor:
    """Compute the mean of the real keys, 0 without any; over B too with `over_batch`.

    Parameters
    ----------
    k : Tensor (B, H, M, D)
        Finite where a key is not real.
    real : bool Tensor (B, 1, M), optional
        True for a real key.
    over_batch : bool

    Returns
    -------
    Tensor (B, H, 1, D) or (1, H, 1, D)
        In the accumulation dtype.
    """
    k = k.to(xp.accumulation(k))
    if real is None:
        return overflow_as_nan(k.mean((0, 2) if over_batch else 2, keepdim=True), xp)
    one = row_of_ones(real, k.dtype)
    total, n = one @ k, one.sum(-1, keepdim=True)
    if over_batch:
        total, n = total.sum(0, keepdim=True), n.sum(0, keepdim=True)
    return overflow_as_nan(total / torch.where(n > 0, n, 1.0), xp)


def prefix_means(
    k: Tensor, real: Tensor | None, offset: int, rows: int
) -> tuple[Tensor, Tensor | None]:
    """Compute the mean of the keys up to each row; the offset is not negative.

    Returns
    -------
    mean : Tensor (B, H, N, D)
        In the accumulation dtype.
    alive : bool Tensor (B, 1, N), or None
        As in `.fold.fold_prefix`.
    """
    n, mean, _ = prefix_moments(k.to(xp.accumulation(k)), real)
    if offset or rows != k.shape[-2]:
        past = torch.arange(offset, offset + rows, device=k.device).clamp(max=k.shape[-2] - 1)
        n, mean = (x.index_select(-2, past) for x in (n, mean))
    return overflow_as_nan(mean, xp), None if real is None else n[..., 0] > 0
