"""Plans by PyTorch's fused attention: the contraction, and the steps before it without casts.

Where L is not read, a call keeps the dtype of its inputs, and one computation does both statistics
and fold, see `FusedRun`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdcore.extend import (
    Call,
    Dropout,
    Group,
    GroupRun,
    Inputs,
    Operands,
    Plan,
    Scores,
    Visibility,
    compiling,
    pool,
    pooling_weights,
)

from . import namespace as xp
from .choice import Fused
from .flash import attend, attend_with_lse, biased, on_cpu, recorded, takes_key_bias, transformed
from .fold import fold, fold_prefix, fold_running
from .recentre import mean_of_keys, prefix_means, recentred
from .windows import Window, attend_in_window

__all__ = [
    "FusedCall",
    "FusedRun",
    "causal_rows",
    "direct",
    "fused_inputs",
    "fused_out",
    "fused_scores",
    "hidden_keys",
    "reads_no_level",
]


def direct(c: Scores, inputs: Inputs) -> Tensor | None:
    """Run a call without pooling, masks and parameters by a fold and one call of PyTorch.

    These are the steps of `FusedRun`, without the objects that other calls need: a small call takes
    as long for them as for the rest.

    Returns
    -------
    Tensor or None
        None for causal rows or prefix statistics at another offset than 0.
    """
    q, k, v = inputs[:3]
    choice, step = c.choice, c.choice.fold
    if (choice.causal or (step is not None and step.of == "prefix")) and inputs.offset != 0:
        return None
    if step is not None:
        groups = q.shape[1] // k.shape[1]
        q = q[:, :, None] if groups == 1 else q.unflatten(1, (-1, groups))
        q, k, _ = folded(step, q, k, None, {}, 0)
        q = q.flatten(1, 2)
        dtype = getattr(torch, choice.narrow)
        if q.dtype != dtype or v.dtype != dtype:
            q, k, v = (x if x.dtype == dtype else x.to(dtype) for x in (q, k, v))
    if recorded(q, k, v):
        out = attend(q, k, v, scale=c.scale, causal=choice.causal)
    else:
        out = on_cpu(q, k, v, None, c.scale, choice.causal)[0]
    return out if out.dtype == inputs.q.dtype else out.to(inputs.q.dtype)


def folded(
    step: Any, q: Tensor, k: Tensor, real: Tensor | None, params: Any, offset: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the statistics of the keys and fold them, see `.fold` and `.recentre`.

    Returns
    -------
    q', k' : Tensor
    alive : bool Tensor (B, 1, N), or None
        Whether a row's prefix has a real key; None where every row has one.
    """
    alive = None
    beta = params["beta"] if step.beta is None else step.beta
    if step.eps is None:
        mean, alive = _means(step.of, q, k, real, params, offset)
        q, k = recentred(q, k, real, mean, beta, of=step.of)
    elif step.of == "running":
        mean, var = params["mean"], params["var"]
        q, k = fold_running(q, k, mean, var, beta, eps=step.eps, split=step.split)
    elif step.of == "prefix":
        q, k, alive = fold_prefix(q, k, real, beta, offset, eps=step.eps, closed=step.closed)
    else:
        over_batch = step.of == "batch"
        q, k = fold(q, k, real, beta, eps=step.eps, split=step.split, over_batch=over_batch)
    return q, k, alive


def _means(
    of: str, q: Tensor, k: Tensor, real: Tensor | None, params: Any, offset: int
) -> tuple[Tensor, Tensor | None]:
    """Return the mean that each row subtracts and, of a prefix, whether a row has one."""
    if of == "running":
        return params["mean"].to(xp.accumulation(k)), None
    if of == "prefix":
        return prefix_means(k, real, offset, q.shape[-2])
    return mean_of_keys(k, real, over_batch=of == "batch"), None


def fused_inputs(plan: Plan, inputs: Inputs) -> Inputs | None:
    """Prepare the inputs of a call whose L is not read for `FusedCall`.

    Returns
    -------
    Inputs or None
        With one leading axis, and the offset an int. None where the kernel cannot compute the
        call: an empty array, a bias with a gradient, a window in a trace, or causal rows at an
        offset other than 0 that do not all see every key.
    """
    q, k, v, _, _, bias, offset, *_ = inputs
    if not all(q.shape) or not all(k.shape) or not v.shape[-1] or recorded(bias):
        return None
    causal, prefix = plan.contraction.choice.causal, plan.prefix
    window = plan.contraction.choice.window is not None
    if window and compiling():
        return None
    if causal or prefix or window:
        keys = k.shape[-2]
        if isinstance(offset, str):
            offset = keys - q.shape[-2]
        if (causal and offset != 0 and offset < keys - 1) or (prefix and offset < 0):
            return None
    else:
        offset = 0  # no position is read
    if q.ndim != 4:
        return _with_one_lead(inputs, offset)
    return inputs if offset is inputs.offset else inputs._replace(offset=offset)


def reads_no_level(plan: Plan, inputs: Inputs) -> bool:
    """Check whether `fused_out` computes a call of one row, whose statistics are carried.

    A row that sees all of its keys needs no position, and such a plan has no support.
    """
    choice = getattr(plan.contraction, "choice", None)
    whole = isinstance(choice, Fused) and choice.whole and not plan.support.restricts
    one = inputs.q.ndim == 4 and inputs.q.shape[-2] == 1 and all(inputs.q.shape)
    return whole and one and bool(inputs.v.shape[-1]) and not (compiling() or transformed())


class FusedCall(Call):
    """A call with one leading axis whose contraction reads arrays in the caller's dtype."""

    def __init__(self, backend: Any, plan: Plan, inputs: Inputs) -> None:
        super().__init__(backend, plan, inputs, level=False)
        self.native = frozenset({"contraction"})

    def _lanes(self, backend: Any) -> Any:
        """Return nothing: PyTorch's kernel drops weights by its own random numbers."""
        return ()

    def dropout(self, group: Group) -> Dropout:
        """Return the probability that a weight is dropped; no words tell which."""
        return Dropout(self.inputs.dropout, (None, None), group.scale)


class FusedRun(GroupRun):
    """A head group of a `FusedCall`, with statistics and fold in one computation."""

    def pool(self) -> None:
        """Pool keys and values; keys stay in the accumulation dtype for their statistics."""
        scale, kind = self.group.scale, self.call.plan.pool
        dtype, wide, real = self.v.dtype, xp.accumulation(self.k), self.key_mask
        k, v = self.k.to(wide), self.v.to(wide)
        if real is None and kind == "mean" and k.shape[-2] % scale == 0:
            self.k, self.v = _window_means(k, scale), _window_means(v, scale).to(dtype)
            return
        weights = pooling_weights(k.shape[-2], real, scale, kind, k, xp=xp)
        self.k, v = (pool(kind, x, weights, xp=xp)[0] for x in (k, v))
        self.v = v.to(dtype)
        self.key_mask = None if real is None else (weights > 0).any(-1)

    def summarise(self) -> None:
        """Compute the statistics, except those that the fold computes itself."""
        if self.call.plan.contraction.choice.fold is None:
            super().summarise()

    def transform(self) -> None:
        """Compute and fold the statistics of the keys, or transform as `GroupRun` does."""
        plan = self.call.plan
        if not plan.transforms:
            self.operands = self.operands_of(self.q, self.k, self.v)
            return
        step = plan.contraction.choice.fold
        if step is None:
            super().transform()
            return
        real, offset = self.key_mask, self.call.offset
        q, k, alive = folded(step, self.q, self.k, real, self.params, offset)
        if alive is not None:
            self.alive = alive[:, :, None]
        self.operands = self.operands_of(q, k, self.v)


def _window_means(x: Tensor, scale: int) -> Tensor:
    """Compute the means of whole windows, several times as fast as PyTorch's reduction."""
    first, *others = x.unflatten(-2, (-1, scale)).unbind(-2)
    total = sum(others, first)
    return total * (1.0 / scale)


def _with_one_lead(inputs: Inputs, offset: int) -> Inputs:
    """Reshape all arrays to one leading axis."""
    q, k, v, mask, key_mask, bias, *_ = inputs
    lead = q.shape[:-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    if key_mask is not None:
        key_mask = key_mask.reshape(-1, k.shape[-2])
    mask, bias = (_one_lead(x, lead) for x in (mask, bias))
    return inputs._replace(q=q, k=k, v=v, mask=mask, key_mask=key_mask, bias=bias, offset=offset)


def _one_lead(x: Any, lead: tuple[int, ...]) -> Any:
    """Reshape a mask or bias to one leading axis, from several or from none."""
    if x is None:
        return None
    shape = (1,) * (len(lead) + 3 - x.ndim) + tuple(x.shape)
    x = x.reshape(shape)
    if all(size == 1 for size in shape[: len(lead)]):
        return x.reshape(1, *shape[-3:])
    return x.expand(*lead, *shape[-3:]).reshape(-1, *shape[-3:])


def causal_rows(c: Scores, seen: Visibility) -> bool | None:
    """Return whether row i sees only keys 0 to i; None if the offset leaves open what it sees."""
    if not c.choice.causal or seen.offset == 0:
        return bool(c.choice.causal)
    return False if seen.static and seen.offset >= seen.keys - 1 else None


def hidden_keys(key_mask: Tensor, q: Tensor) -> Tensor:
    """Return what is added to the scores, (B, 1, 1, M): 0 for a real key, otherwise -inf."""
    real = key_mask.reshape(-1, 1, 1, key_mask.shape[-1])
    return torch.where(real, q.new_zeros(()), -torch.inf)


def fused_scores(c: Scores, o: Operands) -> tuple[Tensor, Tensor] | None:
    """Contract by scores with L, see `score_contraction.scores`.

    Returns
    -------
    (out, L) or None
        None where a mask, a bias or an offset leaves open which rows see a key, and where an
        array is empty.
    """
    seen = o.visibility
    if compiling() or not all(o.q.shape):
        return None
    if not all(o.k.shape) or not o.v.shape[-1] or seen.mask is not None or o.bias is not None:
        return None
    causal = causal_rows(c, seen)
    if causal is None:
        return None
    shape, wide, dtype = o.q.shape, o.q.dtype, getattr(torch, c.choice.dtype)
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (o.q.flatten(-4, -3), o.k, o.v))
    bias = None if o.key_bias is None else o.key_bias.reshape(-1, *o.key_bias.shape[-2:])
    q, k, bias = _with_bias(c, q, k, bias, dtype)
    q, k, v = (x if x.dtype == dtype else x.to(dtype) for x in (q, k, v))
    if c.choice.window is not None:
        out, level = _in_window(c, q, k, v, seen)
        level = torch.where(seen.counts() > 0, level.reshape(shape[:-1]), -torch.inf)
    elif seen.key_mask is None:
        out, level = attend_with_lse(q, k, v, scale=c.scale, causal=causal, key_bias=bias)
    else:
        real = seen.key_mask.reshape(-1, 1, seen.key_mask.shape[-1])
        added = hidden_keys(seen.key_mask, q)
        out, level = attend_with_lse(q, k, v, added, scale=c.scale, causal=causal, key_bias=bias)
        if causal:
            index = torch.arange(shape[-2], device=q.device).clamp(max=seen.keys - 1)
            any_key = (real.cumsum(-1) > 0)[..., index]
        else:
            any_key = real.any(-1, keepdim=True)
        level = torch.where(any_key, level, -torch.inf)
    out = out if out.dtype == wide else out.to(wide)
    return out.reshape(*shape[:-1], v.shape[-1]), level.reshape(shape[:-1]).to(wide)


def _with_bias(
    c: Scores, q: Tensor, k: Tensor, bias: Any, dtype: torch.dtype, *masks: Any
) -> tuple[Tensor, Tensor, Any]:
    """Return q, k and a bias of the keys, or q and k with the bias as a feature, and None."""
    if bias is None or (c.choice.window is None and takes_key_bias(q, dtype, *masks)):
        return q, k, bias
    return *biased(q, k, bias / c.scale, dtype), None


def _in_window(
    c: Scores, q: Tensor, k: Tensor, v: Tensor, seen: Visibility
) -> tuple[Tensor, Tensor]:
    """Attend over the keys of a window, see `.windows.attend_in_window`."""
    real = None if seen.key_mask is None else seen.key_mask.reshape(-1, seen.keys)
    left, ahead = c.choice.window
    window = Window(left, ahead, seen.offset)
    return attend_in_window(q, k, v, real, scale=c.scale, window=window)


def fused_out(c: Scores, o: Operands) -> Tensor:
    """Contract a `FusedCall` by scores without L; rows that see no key become zeros."""
    q, k, v, seen = o.q, o.k, o.v, o.visibility
    dtype = getattr(torch, c.choice.narrow)
    q, k, bias = _with_bias(c, q, k, o.key_bias, dtype, o.bias, seen.mask)
    q = q if q.dtype == dtype else q.to(dtype)
    k = k if k.dtype == dtype else k.to(dtype)
    v = v if v.dtype == dtype else v.to(dtype)
    if c.choice.window is not None:
        return _in_window(c, q.flatten(1, 2), k, v, seen)[0].unflatten(1, q.shape[1:3])
    allowed = None if seen.mask is None else seen.mask.flatten(1, 2)
    if seen.key_mask is not None:
        real = seen.key_mask[:, :, None, :]
        allowed = real if allowed is None else allowed & real
    added = None if o.bias is None else o.bias.flatten(1, 2).to(dtype)
    if allowed is not None:
        zero = q.new_zeros(()) if added is None else added
        added = torch.where(allowed, zero, -torch.inf)
    # At another offset every row sees every key, see `fused_inputs`.
    causal = True if c.choice.causal and seen.offset == 0 else False  # noqa: SIM210 - it may be a tensor
    p = 0.0 if o.dropout is None else o.dropout.p
    options = {"scale": c.scale, "causal": causal, "key_bias": bias, "dropout": p}
    out = attend(q.flatten(1, 2), k, v, added, **options)
    return out.unflatten(1, q.shape[1:3])
