"""Softmax attention and its gradient in differentiable calls, for gradients of gradients.

Shapes as in `.flash`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import namespace as xp

__all__ = ["gradients", "plain_attention"]

#: Query rows of a block.
ROWS = 256


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor | None,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull cotangents of out and lse back in differentiable calls, by blocks of rows."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    wide = lse.dtype
    keys, values = keys.to(wide), values.to(wide)
    d_out = torch.zeros_like(out) if d_out is None else d_out
    delta = (d_out.to(wide) * out.to(wide)).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse
    dq, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, q.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        last = min(start + ROWS, k.shape[2]) if causal else k.shape[2]
        x, seen, value = q[:, :, rows].to(wide), keys[:, :, :last], values[:, :, :last]
        d = d_out[:, :, rows].to(wide)
        s = scale * (x @ seen.mT)
        if mask is not None:
            cut = mask if mask.shape[-2] == 1 else mask[..., rows, :]
            s = s + (cut if mask.shape[-1] == 1 else cut[..., :last])
        if causal:
            row = torch.arange(start, start + x.shape[2], device=q.device)
            later = torch.arange(last, device=q.device) > row[:, None]
            s = s.masked_fill(later, -torch.inf)
        p = torch.exp(s - lse[:, :, rows, None])
        ds = scale * p * (d @ value.mT - delta[:, :, rows, None])
        dq.append(ds @ seen)
        more = (0, 0, 0, k.shape[2] - last)
        dk = dk + pad(ds.mT @ x, more)
        dv = dv + pad(p.mT @ d, more)
    if group > 1:
        dk, dv = (x.unflatten(1, (k.shape[1], group)).sum(2) for x in (dk, dv))
    return torch.cat(dq, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Compute out and lse in differentiable calls, for gradients of gradients only."""
    group = q.shape[1] // k.shape[1]
    wide = xp.accumulation(q)
    q, k, v = q.to(wide), *(x.to(wide).repeat_interleave(group, 1) for x in (k, v))
    s = scale * (q @ k.mT)
    if mask is not None:
        s = s + mask
    if causal:
        seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~seen, -torch.inf)
    none = (s == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(s.masked_fill(none, 0.0), -1, keepdim=True).masked_fill(none, 0.0)
    return torch.exp(s - lse) @ v, lse[..., 0]
