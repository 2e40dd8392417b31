"""PyTorch's fused attention kernels on CUDA, called by name for the log-sum-exp.

Shapes: q (B, Hq, N, D), k and v (B, Hkv, M, D). Except for a mask, no (N, M) array is built.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from pdcore.extend import compiling

__all__ = [
    "STEP",
    "TILE",
    "State",
    "by_cudnn",
    "lse_backward",
    "lse_forward",
    "on_device",
    "widened",
    "with_lse",
]

_aten = torch.ops.aten
#: The alignment in bytes of the rows of a mask.
ALIGNMENT = 16
#: The most features that the flash kernels accept, and the step of their number.
FLASH_MOST, STEP = 256, 8


#: The queries and keys of a tile of cuDNN.
TILE = 128

# Flash accepts no mask, and cuDNN does not define the result of a row that sees no key.
_MASKED = [SDPBackend.EFFICIENT_ATTENTION]
_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_MASKED]


def by_cudnn(rows: Any, keys: Any, derived: bool) -> bool:
    """Check whether cuDNN may run a call without a mask.

    cuDNN builds a plan, in tens of milliseconds, for every shape that is new. Few queries are those
    of decoding, where the number of keys is new at every step.

    cuDNN's gradient computes exp(0 - L) for the rest of a tile that queries or keys do not fill,
    which overflows for a log-sum-exp L below -88.7 and makes the gradient NaN. Few plans bound L
    from below (`bn` over a sequence does, up to rounding), so cuDNN gets whole tiles only.

    Parameters
    ----------
    rows, keys : int
        The numbers of queries and of keys; symbolic in a trace, where only what holds for all
        lengths counts.
    derived : bool
        Whether a gradient may be computed.
    """
    if torch.jit.is_tracing():  # the trace serves other lengths, too
        return False
    known = _known if compiling() else bool
    whole = not derived or (known(rows % TILE == 0) and known(keys % TILE == 0))
    return whole and known(rows >= TILE)


def _known(condition: Any) -> bool:
    """Check whether a condition on symbolic sizes holds for all of them, without a guard."""
    # The module takes long to import, and is there while the compiler runs.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    known: bool = statically_known_true(condition)
    return known


@lru_cache(maxsize=16)
def _order(index: int | None, cudnn: bool) -> tuple[SDPBackend, ...]:
    """Return the fused kernels without a mask in the order in which they are tried."""
    first, *others = _FUSED
    if not cudnn:
        return tuple(others)
    # The flash kernels are written for the tensor cores of compute capability 8.0.
    newer = torch.cuda.get_device_capability(index) >= (9, 0)
    return (first, *others) if newer else (*others, first)


def on_device(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    derived: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(scale q.k + mask) v by the first fused kernel that accepts the call.

    `derived` tells whether a gradient may be computed, see `by_cudnn`; `dropout` is the probability
    that a weight is dropped.
    """
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210 - it may be a symbol
    if grouped and q.device.type == "cuda" and (q.dtype == torch.float32 or mask is not None):
        # Only the fused kernels for 16 bits without a mask share key heads.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        grouped = False
    if mask is not None and causal:  # `scaled_dot_product_attention` refuses the two together
        rows, keys = q.shape[2], k.shape[2]
        seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril()
        mask = torch.where(seen, mask, torch.full_like(mask, -torch.inf))
        causal = False
    if q.device.type == "cpu":
        return scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )
    cudnn = mask is None and not dropout and by_cudnn(q.shape[2], k.shape[2], derived)
    if mask is not None:
        allowed = sdpa_kernel(_MASKED)
    elif compiling():  # a trace cannot read the device: PyTorch's own order
        allowed = sdpa_kernel(_FUSED if cudnn else _FUSED[1:])
    else:
        allowed = sdpa_kernel(list(_order(q.device.index, cudnn)), set_priority=True)
    with allowed:
        return scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )


class State(NamedTuple):
    """The values that the forward of a kernel leaves for its backward, besides out.

    Attributes
    ----------
    tensors : tuple of Tensor or None
        The log-sum-exp in the kernel's layout, and the tensors that only the kernel reads.
    sizes : tuple of int
        The longest sequences; empty for the memory-efficient kernel.
    """

    tensors: tuple[Any, ...]
    sizes: tuple[Any, ...]


def lse_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor, State]:
    """Compute attention and its log-sum-exp (B, Hq, N): flash in 16 bits, else memory-efficient."""
    if mask is None and q.dtype != torch.float32 and q.shape[-1] + STEP <= FLASH_MOST:
        out, lse, *more, seed, offset, _ = _aten._scaled_dot_product_flash_attention.default(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return out, lse, State((lse, *more[:2], seed, offset), tuple(more[2:]))
    k, v = (_repeat_heads(x, q) for x in (k, v))
    out, lse, seed, offset = _aten._scaled_dot_product_efficient_attention.default(
        q, k, v, _aligned(mask, q, k), True, 0.0, causal, scale=scale
    )
    if mask is not None:
        # The kernel does not define a row that sees no key: make it 0, with a gradient of 0.
        none = lse.isinf()
        lse = torch.where(none, torch.inf, lse)
        out = torch.where(none[..., : q.shape[2], None], 0.0, out)
    return out, lse[..., : q.shape[2]], State((lse, seed, offset), ())


def lse_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    out: Tensor,
    state: State,
    d_out: Tensor | None,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull cotangents of out and of the log-sum-exp back, see `lse_forward`."""
    width, heads = q.shape[-1], k.shape[1]
    if d_lse is not None:
        q, k, v, out, d_out = with_lse(q, k, v, out, d_out, d_lse, STEP)
    if state.sizes:
        lse, first, second, seed, offset = state.tensors
        grads = _aten._scaled_dot_product_flash_attention_backward.default(
            d_out,
            q,
            k,
            v,
            out,
            lse,
            first,
            second,
            *state.sizes,
            0.0,
            causal,
            seed,
            offset,
            scale=scale,
        )
    else:
        lse, seed, offset = state.tensors
        k, v = (_repeat_heads(x, q) for x in (k, v))
        bias = _aligned(mask, q, k)
        grads = _aten._scaled_dot_product_efficient_attention_backward.default(
            d_out,
            q,
            k,
            v,
            bias,
            out,
            lse,
            seed,
            offset,
            0.0,
            [True, True, True, False],
            causal,
            scale=scale,
        )
    dq, dk, dv = (x[..., :width] for x in grads[:3])
    if dk.shape[1] != heads:
        dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def with_lse(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor | None, d_lse: Tensor, step: int
) -> tuple[Tensor, ...]:
    """Append the log-sum-exp's cotangent as a feature, for a backward that reads only d_out.

    The gradient of the scores is p (d_out.v - d_out.out + d_lse). In the appended feature v is 0,
    out is -1 and d_out is d_lse: d_out.v stays, and d_out.out becomes d_out.out - d_lse.

    Parameters
    ----------
    q, k, v, out, d_out : Tensor
        With the same number of features.
    d_lse : Tensor (B, Hq, N)
    step : int
        The number of features is padded to a multiple of `step`.

    Returns
    -------
    q, k, v, out, d_out : Tensor
        With features appended, whose gradients the caller drops.
    """
    dim = q.shape[-1]
    width = dim + 1
    width += -width % step
    d_out = torch.zeros_like(out) if d_out is None else d_out
    rest = (0, width - dim - 1)
    column = d_lse[..., None].to(d_out.dtype)
    return (
        *(widened(x, width) for x in (q, k, v)),
        torch.cat([out, pad(torch.full_like(column, -1.0), rest)], -1),
        torch.cat([d_out, pad(column, rest)], -1),
    )


def widened(x: Tensor, width: int) -> Tensor:
    """Pad the features with zeros to `width`, and make the feature axis contiguous."""
    x = x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _repeat_heads(x: Tensor, q: Tensor) -> Tensor:
    """Repeat key heads for each of their query heads."""
    group = q.shape[1] // x.shape[1]
    return x.repeat_interleave(group, 1) if group > 1 else x


def _aligned(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Align the rows of a mask as the memory-efficient kernel needs them, (B, Hq, N, M)."""
    if mask is None:
        return None
    keys = k.shape[2]
    short = -keys % (ALIGNMENT // mask.element_size())
    whole = mask.expand(*mask.shape[:-1], keys)
    laid = pad(whole, (0, short))[..., :keys]
    return laid.expand(q.shape[0], q.shape[1], q.shape[2], keys)
