"""Softmax attention by PyTorch's fused kernels, with gradients of gradients.

Shapes: q (B, Hq, N, D), k and v (B, Hkv, M, D); the kernels need the same number of features in
all three. PyTorch's kernel that builds an (N, M) array is never used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdcore.extend import compiling, score_contraction

from .derivatives import gradients, plain_attention
from .inner import Inner, run_inner
from .kernels import STEP, State, lse_backward, lse_forward, on_device, widened, with_lse

__all__ = [
    "attend",
    "attend_with_lse",
    "biased",
    "on_cpu",
    "one_width",
    "pull_back_on_cpu",
    "recorded",
    "takes_key_bias",
    "transformed",
    "with_cotangents",
]


# Called by name, half the time of `scaled_dot_product_attention` on a small call.
_forward = torch._scaled_dot_product_flash_attention_for_cpu
#: The gradient of the fused CPU kernel.
pull_back_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
#: The least |d_out|^2 by which a cotangent of the log-sum-exp is divided.
SHORTEST = 1e-20
#: Scores below this do not overflow.
OVERFLOW = 1e38


def recorded(*tensors: Any) -> bool:
    """Check whether automatic differentiation records operations on some tensors."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def transformed() -> bool:
    """Check whether a transformation of `torch.func`, or forward mode, is active."""
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0 or bool(torch._C._are_functorch_transforms_active())


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    key_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(scale q.k + mask) v by a fused kernel.

    Parameters
    ----------
    q, k, v : Tensor
        As in the module's docstring, except that v may have another number of features.
    mask : Tensor of q's dtype broadcastable to (B, Hq, N, M), optional
        Added to the scores; -inf hides a key. The mask gets no gradient.
    scale : float
        tau.
    causal : bool
        Whether row i sees only keys 0 to i.
    key_bias : Tensor (B, Hkv, M), optional
        Added to the scores of a key, with a gradient. Only where `takes_key_bias`.
    dropout : float
        The probability that a weight is dropped, by PyTorch's own random numbers.

    Returns
    -------
    Tensor (B, Hq, N, Dv)
        Zeros in a row that sees no key.
    """
    width = v.shape[-1]
    q, k, v = one_width(q, k, v)
    if dropout:
        if key_bias is not None:
            q, k = biased(q, k, key_bias / scale, q.dtype)
        out = on_device(q, k, v, mask, scale, causal, derived=True, dropout=dropout)
    elif q.device.type == "cpu" and not compiling():
        if recorded(q, k, v, key_bias):
            out = _OnCpu.apply(q, k, v, mask, scale, causal, key_bias)[0]
        else:
            out = on_cpu(q, k, v, mask, scale, causal, key_bias)[0]
    elif compiling() or not recorded(q, k, v):
        out = on_device(q, k, v, mask, scale, causal, recorded(q, k, v))
    else:
        out = _OnDevice.apply(q, k, v, mask, scale, causal)
    return out if out.shape[-1] == width else out[..., :width]


def attend_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `attend` does, and the log-sum-exp (B, Hq, N) of every row.

    The log-sum-exp of a row that sees no key is not defined.
    """
    width = v.shape[-1]
    q, k, v = one_width(q, k, v)
    if q.device.type != "cpu":
        if recorded(q, k, v):
            out, lse = _WithLse.apply(q, k, v, mask, scale, causal)
        else:
            out, lse, _ = lse_forward(q, k, v, mask, scale, causal)
    elif recorded(q, k, v, key_bias):
        out, lse = _OnCpu.apply(q, k, v, mask, scale, causal, key_bias)
    else:
        out, lse = on_cpu(q, k, v, mask, scale, causal, key_bias)
    return (out if out.shape[-1] == width else out[..., :width]), lse


def takes_key_bias(q: Tensor, dtype: torch.dtype, *masks: Tensor | None) -> bool:
    """Check whether a bias of the keys is added to the scores, not appended as a feature.

    The sum with a mask that has rows would be an (N, M) array, and 16 bits would round it.
    """
    wide = dtype in (torch.float32, torch.float64)
    rows = any(mask is not None and mask.shape[-2] != 1 for mask in masks)
    return q.device.type == "cpu" and wide and not rows and not compiling()


def on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute out and the log-sum-exp by the fused CPU kernel; NaN where scores overflow.

    The kernel returns zeros, and a log-sum-exp of 0, for a row in which every score is -inf, and
    with few keys for a row of NaN scores too. In a row of scores that are not of ordinary size, one
    that overflows to -inf may be that of the nearest key, see `score_contraction.with_overflow`.
    """
    group, row = q.shape[1] // k.shape[1], None
    if key_bias is not None:
        row = (key_bias.repeat_interleave(group, 1) if group > 1 else key_bias)[:, :, None]
        mask = row if mask is None else row + mask
    out, lse = _forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    # A tensor of a subclass, such as a fake one, may have no values to read.
    if type(lse) is not Tensor or not lse.numel():
        return out, lse
    ends = lse.aminmax()
    least, most = ends[0].item(), ends[1].item()
    if max(-least, most) <= score_contraction.ORDINARY and (
        least > 0 or most < 0 or (least < 0 < most and bool((lse != 0).all()))
    ):
        return out, lse
    factor = max(1.0, abs(scale))
    most = factor * q.shape[-1] * _largest(q) * _largest(k)
    if most + (0.0 if row is None else _largest(row)) < OVERFLOW:
        return out, lse
    size = lse.abs()
    rows, keys = (x.detach().to(lse.dtype).abs() for x in (q, k))
    reach = keys.amax(-2, keepdim=True).repeat_interleave(group, 1)
    bound = factor * (rows @ reach.mT)[..., 0]
    if row is not None:
        bound = bound + row.detach().abs().amax(-1)
    lost = ((size == 0) | (size > score_contraction.ORDINARY)) & ~(bound < torch.inf)
    return out.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)


def _largest(x: Tensor) -> float:
    """Return the largest absolute value, NaN where there is one."""
    least, most = (float(end.item()) for end in x.detach().aminmax())
    return max(-least, most)


def biased(q: Tensor, k: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Append features whose product adds a bias of the keys; in 16 bits a sum of parts.

    A bias that leaves the range of the parts, -2^31 in float16, becomes NaN.
    """
    # The range of float16 ends at 65,504.
    units = {torch.float16: (2.0**15, 2.0**8), torch.bfloat16: (1.0,)}.get(dtype, ())
    parts, rest = [], bias
    for unit in units:
        part = (rest / unit).to(dtype).to(bias.dtype)
        parts.append(part)
        rest = rest - unit * part
    last = units[-1] if units else 1.0
    parts.append(rest / last)
    columns = [q.new_full((), unit).expand(*q.shape[:-1], 1) for unit in (*units, last)]
    return torch.cat([q, *columns], -1), torch.cat([k, torch.stack(parts, -1)], -1)


def one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append zeros where the numbers of features differ, which changes no product."""
    width = q.shape[-1]
    fits = v.shape[-1] == width and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if fits and q.device.type == "cpu":
        return q, k, v
    width = max(width, v.shape[-1])
    if q.device.type == "cuda":
        width += -width % 8  # the alignment that the memory-efficient kernel needs
    return widened(q, width), widened(k, width), widened(v, width)


class _OnCpu(torch.autograd.Function):  # type: ignore[misc]
    """The fused CPU kernel, with the second derivative that PyTorch's own rule lacks.

    The kernel gives no gradient of a bias: for the gradient that of the keys is a feature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        key_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = on_cpu(q, k, v, mask, scale, causal, key_bias)
        ctx.save_for_backward(q, k, v, mask, key_bias, out, lse)
        ctx.scale, ctx.causal = scale, causal
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        d_out, d_lse = d
        q, k, v, mask, key_bias, out, lse = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 7
        dims, differentiable = q.shape[-1], torch.is_grad_enabled()
        if key_bias is not None:
            q, k = biased(q, k, key_bias / ctx.scale, q.dtype)
        if differentiable:
            grads = gradients(q, k, v, mask, ctx.scale, ctx.causal, out, lse, d_out, d_lse)
        else:
            if key_bias is not None:
                d_out = torch.zeros_like(out) if d_out is None else d_out
                width = q.shape[-1] + -q.shape[-1] % STEP
                q, k, v, out, d_out = (widened(x, width) for x in (q, k, v, out, d_out))
            q, k, v, out, d_out = with_cotangents(q, k, v, out, d_out, d_lse)
            grads = pull_back_on_cpu(
                d_out, q, k, v, out, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
            )
        d_bias = None if key_bias is None else grads[1][..., dims] / ctx.scale
        return (*(x[..., :dims] for x in grads), None, None, None, d_bias)


def with_cotangents(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor, ...]:
    """Return q, k, v, out and d_out such that their gradient is that of both cotangents.

    The arrays may have one more feature, whose gradient the caller drops.
    """
    if d_lse is None:
        assert d_out is not None
        return q, k, v, out, d_out
    shifted = _shifted(out, d_out, d_lse)
    if shifted is None:
        return with_lse(q, k, v, out, d_out, d_lse, 1)
    return q, k, v, shifted, d_out


def _shifted(out: Tensor, d_out: Tensor | None, d_lse: Tensor) -> Tensor | None:
    """Return what the backward must read as out to compute d_out.out - d_lse in place of d_out.out.

    The backward reads out in this product only, so out may move along d_out, which costs a pass
    over out where `with_lse` adds a feature to all arrays. None where d_out of a row is too short.
    """
    # A tensor of a subclass, such as a fake one, may have no values to read.
    if d_out is None or type(d_lse) is not Tensor:
        return None
    square = (d_out * d_out).sum(-1)
    none = d_lse == 0
    if not bool((none | (square > SHORTEST)).all()):
        return None
    step = torch.where(none, 0.0, d_lse / torch.where(none, 1.0, square))
    return torch.addcmul(out, d_out, step[..., None], value=-1.0)


class _OnDevice(torch.autograd.Function):  # type: ignore[misc]
    """A fused CUDA kernel with PyTorch's own gradient, and with a second derivative."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        ctx.scale, ctx.causal = scale, causal
        ctx.inner, [out] = run_inner(_OnDevice.computed(mask, scale, causal), q, k, v)
        ctx.save_for_backward(q, k, v, mask)
        return out

    @staticmethod
    def computed(mask: Tensor | None, scale: float, causal: bool) -> Any:
        """Return the kernel as a function of the arrays that have a gradient."""
        return lambda q, k, v: (on_device(q, k, v, mask, scale, causal, derived=True),)

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        [d_out] = d
        q, k, v, mask = ctx.saved_tensors
        if not torch.is_grad_enabled():
            # A record serves one gradient; for another the forward pass runs again.
            inner = ctx.inner or Inner(_OnDevice.computed(mask, ctx.scale, ctx.causal), q, k, v)
            ctx.inner = None
            return (*inner.pull_back(d_out), None, None, None)
        out, lse = plain_attention(q, k, v, mask, ctx.scale, ctx.causal)
        return (
            *gradients(q, k, v, mask, ctx.scale, ctx.causal, out, lse, d_out, None),
            None,
            None,
            None,
        )


class _WithLse(torch.autograd.Function):  # type: ignore[misc]
    """A fused CUDA kernel with its log-sum-exp, and the gradient of both, which PyTorch lacks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse, state = lse_forward(q, k, v, mask, scale, causal)
        ctx.scale, ctx.causal, ctx.sizes = scale, causal, state.sizes
        ctx.save_for_backward(q, k, v, mask, out, lse, *state.tensors)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        d_out, d_lse = d
        q, k, v, mask, out, lse, *more = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 6
        if torch.is_grad_enabled():
            grads = gradients(q, k, v, mask, ctx.scale, ctx.causal, out, lse, d_out, d_lse)
        else:
            state = State(tuple(more), ctx.sizes)
            grads = lse_backward(q, k, v, mask, ctx.scale, ctx.causal, out, state, d_out, d_lse)
        return (*grads, None, None, None)
