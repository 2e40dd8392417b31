"""The short way: plans that are softmax attention of other queries and keys, by a fused kernel.

It keeps the dtype of the inputs, casts and copies nothing that the kernel does not need, and gives
no log-sum-exp; whatever it declines runs by `pdcore.backend.array_backend`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pdcore.extend import (
    Fold,
    GaussianRows,
    Group,
    Inputs,
    Operands,
    Plan,
    Rows,
    cut_heads,
    pool,
    pooling_weights,
)

from . import namespace as xp
from .choice import Fused
from .flash import attend, attend_with_lse, biased, recorded
from .fold import fold, fold_given, fold_prefix

__all__ = ["direct", "fused_scores", "plain"]


def plain(c: Fused, inputs: Inputs) -> Tensor:
    """Run a call in which nothing happens to queries, keys and values, and no gradient is kept."""
    return scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, scale=c.scale, enable_gqa=c.grouped
    )


def direct(plan: Plan, inputs: Inputs) -> Tensor | None:
    """Run a plan whose contraction is `Fused` and `short`.

    Returns
    -------
    Tensor (*B, Hq, N, Dv) or None
        None where a call declines: nothing to compute, a bias with a gradient, causal rows at an
        offset at which the kernel has no triangle.
    """
    q, k, v, mask, key_mask, bias, offset, params, *_ = inputs
    c: Any = plan.contraction
    rows, keys = q.shape[-2], k.shape[-2]
    if not all(q.shape) or not all(k.shape) or not v.shape[-1] or recorded(bias):
        return None
    if isinstance(offset, str):
        offset = keys - rows
    causal, prefix = c.causal, plan.spec.prefix
    if causal and isinstance(offset, int) and offset >= keys - 1:
        causal = False  # every row sees every key
    if (causal and offset != 0) or (prefix and offset < 0):
        return None
    lead = q.shape[:-3]
    if len(lead) != 1:
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        if key_mask is not None:
            key_mask = key_mask.reshape(-1, keys)
        mask, bias = (_one_lead(x, lead) for x in (mask, bias))
    if key_mask is not None:
        # Whatever stands in padding must not enter a product, nor a gradient.
        k, v = (torch.where(key_mask[:, None, :, None], x, 0.0) for x in (k, v))
    grouped = q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    outs = []
    for group in plan.groups:
        own = tuple(cut_heads(x, group.heads, 1, xp) for x in (grouped, k, v))
        extra = tuple(_heads(x, group, k.shape[1]) for x in (mask, bias))
        given = {name: _shaped(x, group) for name, x in params.items()}
        outs.append(_group(plan, group, own, key_mask, extra, given, offset, causal))
    out = outs[0]
    if len(outs) > 1:
        out = torch.cat([outs[group][:, start:stop] for group, start, stop in c.runs], 1)
    out = out.flatten(1, 2)
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[-3:])


def _group(
    plan: Plan,
    group: Group,
    own: tuple[Tensor, ...],
    key_mask: Any,
    extra: tuple[Any, Any],
    params: dict[str, Any],
    offset: Any,
    causal: bool,
) -> Tensor:
    """Run the heads of one scale; q (B, H, G, N, D)."""
    q, k, v = own
    c: Any = plan.contraction
    real = None if key_mask is None else key_mask[:, None, :]
    if group.scale > 1:
        k, v, real = pooled(k, v, real, group.scale, plan.pool)
    mask, bias = extra
    alive, dtype = None, v.dtype
    if plan.transforms:
        q, k, alive = _transformed(plan, q, k, real, params, offset)
        v = v if v.dtype == q.dtype else v.to(q.dtype)
    elif k.dtype != q.dtype:
        k = k.to(q.dtype)
    allowed = (
        mask
        if real is None
        else real[:, :, None, :]
        if mask is None
        else mask & real[:, :, None, :]
    )
    added = None if bias is None else bias.to(q.dtype)
    if allowed is not None:
        zero = torch.zeros((), dtype=q.dtype, device=q.device) if added is None else added
        added = torch.where(allowed, zero, -torch.inf)
    out = attend(q.flatten(1, 2), k, v, added, scale=c.scale, causal=causal)
    if alive is not None:
        out = torch.where(alive[..., None], out, 0.0)
    out = out if out.dtype == dtype else out.to(dtype)
    return out.unflatten(1, q.shape[1:3])


def _transformed(
    plan: Plan, q: Tensor, k: Tensor, real: Any, params: dict[str, Any], offset: Any
) -> tuple[Tensor, Tensor, Any]:
    first = plan.transforms[0]
    if isinstance(first, Fold) and len(plan.transforms) == 1:
        batch = first.batch
        beta = batch.weight(params)
        if batch.statistics == "running":
            return *fold_given(
                q, k, params["mean"], params["var"], beta, eps=batch.eps, split=first.split
            ), None
        if batch.statistics == "prefix":
            return fold_prefix(q, k, real, beta, offset, eps=batch.eps, closed=first.closed)
        return *fold(
            q,
            k,
            real,
            beta,
            eps=batch.eps,
            split=first.split,
            over_batch=batch.statistics == "batch",
        ), None
    wide = xp.accumulation(q)
    rows = Rows(q.to(wide).flatten(2, 3), k.to(wide), key_mask=real)
    state: Any = {}
    if plan.summary is not None:
        keep = None if real is None else real[..., None]
        state = plan.summary.statistics.of(rows.k, keep, xp=xp)
        if plan.summary.scope == "batch":
            from pdcore.extend import reduce_axis

            state = reduce_axis(plan.summary.statistics, state, 0, xp=xp)
        state = plan.summary.statistics.finalize(state, xp=xp)
    for step in plan.transforms:
        rows, _ = step(rows, state, params, xp=xp)
    folded, keys = rows.q, rows.k
    if isinstance(plan.transforms[-1], GaussianRows):
        c: Any = plan.contraction
        folded, keys = biased(folded, keys, rows.key_bias / c.scale, q.dtype)
    return folded.to(q.dtype).unflatten(2, q.shape[2:4]), keys.to(q.dtype), None


def pooled(k: Tensor, v: Tensor, real: Any, scale: int, kind: str) -> tuple[Tensor, Tensor, Any]:
    """Pool keys and values; see `pdcore.spec.heads`.

    The keys stay in the accumulation dtype, as statistics would magnify a rounding.
    """
    dtype, wide = v.dtype, xp.accumulation(k)
    k, v = k.to(wide), v.to(wide)
    if real is None and kind == "mean" and k.shape[-2] % scale == 0:
        return _mean(k, scale), _mean(v, scale).to(dtype), None
    weights = pooling_weights(k.shape[-2], real, scale, kind, k, xp=xp)
    k, v = (pool(kind, x, weights, xp=xp)[0] for x in (k, v))
    return k, v.to(dtype), None if real is None else (weights > 0).any(-1)


def _mean(x: Tensor, scale: int) -> Tensor:
    """Take the means of whole windows; several times as fast as PyTorch's reduction."""
    first, *others = x.unflatten(-2, (-1, scale)).unbind(-2)
    total = sum(others, first)
    return total * (1.0 / scale)


def _one_lead(x: Any, lead: tuple[int, ...]) -> Any:
    """Give a mask or bias one leading axis in place of several, or of none."""
    if x is None:
        return None
    shape = (1,) * (len(lead) + 3 - x.ndim) + tuple(x.shape)
    x = x.reshape(shape)
    if all(size == 1 for size in shape[: len(lead)]):
        return x.reshape(1, *shape[-3:])
    return x.expand(*lead, *shape[-3:]).reshape(-1, *shape[-3:])


def _heads(x: Any, group: Group, count: int) -> Any:
    """Cut the query heads of a group out of a mask or bias, (B, Hq, N, M)."""
    if x is None:
        return None
    x = x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))
    if x.shape[1] == 1 or len(group.heads) == count:
        return x
    return cut_heads(x.unflatten(1, (count, -1)), group.heads, 1, xp).flatten(1, 2)


def _shaped(x: Tensor, group: Group) -> Tensor:
    """Give a parameter (H,) or (H, D) of the group's heads as (H, 1, 1) or (H, 1, D)."""
    x = cut_heads(x, group.heads, 0, xp)
    if x.ndim <= 2:
        x = x.reshape(x.shape[0], 1, *(x.shape[1:] or (1,)))
    return x.to(xp.accumulation(x))


def fused_scores(c: Fused, o: Operands) -> tuple[Tensor, Tensor] | None:
    """Contract by scores with the log-sum-exp, for the generic way.

    Returns
    -------
    (out, L) or None
        As `score_contraction.scores`; None where a mask, a bias or the offset keeps a row
        from being known to see a key or not.
    """
    seen = o.visibility
    if torch.compiler.is_compiling() or not all(o.q.shape):
        return None
    if not all(o.k.shape) or not o.v.shape[-1] or seen.mask is not None or o.bias is not None:
        return None
    causal = c.causal
    if causal and seen.offset != 0:
        if not (seen.static and seen.offset >= seen.keys - 1):
            return None
        causal = False
    shape, wide, dtype = o.q.shape, o.q.dtype, getattr(torch, c.dtype)
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (o.q.flatten(-4, -3), o.k, o.v))
    if o.key_bias is not None:
        bias = o.key_bias.reshape(-1, *o.key_bias.shape[-2:]) / c.scale
        q, k = biased(q, k, bias, dtype)
    q, k, v = (x if x.dtype == dtype else x.to(dtype) for x in (q, k, v))
    if seen.key_mask is None:
        out, level = attend_with_lse(q, k, v, scale=c.scale, causal=causal)
    else:
        real = seen.key_mask.reshape(-1, 1, seen.key_mask.shape[-1])
        added = torch.where(real[:, :, None, :], q.new_zeros(()), -torch.inf)
        out, level = attend_with_lse(q, k, v, added, scale=c.scale, causal=causal)
        if causal:
            index = torch.arange(shape[-2], device=q.device).clamp(max=seen.keys - 1)
            any_key = (real.cumsum(-1) > 0)[..., index]
        else:
            any_key = real.any(-1, keepdim=True)
        level = torch.where(any_key, level, -torch.inf)
    out = out if out.dtype == wide else out.to(wide)
    return out.reshape(*shape[:-1], v.shape[-1]), level.reshape(shape[:-1]).to(wide)
