"""The blocked contraction by scores as an operator of PyTorch, for its compiler and for export.

A trace of the loops over blocks would be valid for one length only, and grow with the sequence;
``torch.ops.pdcore.scores`` is a single node for any length. An operator takes no objects, so the
plan is passed as text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdcore.extend import Dropout, Operands, Scores, Visibility, restored, scores, scores_vjp

from . import namespace as xp

__all__ = ["BLOCKS", "traced_scores"]


#: Queries and keys of a block.
BLOCKS = (256, 512)

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? bias, Tensor[] values, "
    "Tensor? key_mask, Tensor? real, Tensor? mask, Tensor? positions, Tensor? q_labels, "
    "Tensor? k_labels, Tensor? lanes, "
    "SymInt offset, SymInt length, int scale, float p, str plan"
)


def traced_scores(o: Operands, plan: str) -> tuple[Tensor, Tensor]:
    """Contract by scores through the operator; `plan` is the `Plan.text`."""
    seen = o.visibility
    static, dropout = isinstance(seen.offset, int), o.dropout
    results: tuple[Tensor, Tensor] = torch.ops.pdcore.scores(
        o.q,
        o.k,
        o.v,
        o.key_bias,
        o.bias,
        list(o.values.values()),
        seen.key_mask,
        seen.real,
        seen.mask,
        None if static else seen.offset,
        *(seen.labels or (None, None)),
        None if dropout is None else torch.stack(dropout.lanes),
        seen.offset if static else 0,
        seen.length,
        seen.scale,
        0.0 if dropout is None else dropout.p,
        plan,
    )
    return results


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Any,
    bias: Any,
    values: Any,
    key_mask: Any,
    real: Any,
    mask: Any,
    positions: Any,
    q_labels: Any,
    k_labels: Any,
    lanes: Any,
    offset: int,
    length: int,
    scale: int,
    p: float,
    plan: str,
) -> tuple[Scores, Operands]:
    """Return the contraction and its operands from the arguments of the operator."""
    lowered = restored(plan)
    contraction = lowered.contraction
    assert isinstance(contraction, Scores)
    seen = Visibility(
        lowered.support,
        xp,
        q.shape[-2],
        length if scale > 1 else k.shape[-2],
        scale,
        offset if positions is None else positions,
        key_mask,
        real,
        mask,
        q.device,
        None if q_labels is None else (q_labels, k_labels),
    )
    dropout = None if lanes is None else Dropout(p, (lanes[0], lanes[1]), scale)
    return contraction, Operands(
        q, k, v, key_bias, bias, dict(zip(contraction.scalars, values, strict=True)), seen, dropout
    )


@torch.library.custom_op(
    "pdcore::scores",
    mutates_args=(),  # type: ignore[untyped-decorator]
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
)
def _scores(*arguments: Any) -> tuple[Tensor, Tensor]:
    c, o = _operands(*arguments)
    out, level = scores(c, o, xp=xp, query_block=BLOCKS[0], key_block=BLOCKS[1])
    return out.contiguous(), level.contiguous()


@_scores.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1])


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "pdcore::scores_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor out, Tensor level, Tensor d_out, Tensor d_level) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
def _scores_backward(*arguments: Any) -> Any:
    *inputs, out, level, d_out, d_level = arguments
    c, o = _operands(*inputs)
    d = scores_vjp(
        c, o, out, level, d_out, d_level, xp=xp, query_block=BLOCKS[0], key_block=BLOCKS[1]
    )
    names = ("q", "k", "v", "key_bias", "bias")
    first = (d[name].contiguous() if name in d else out.new_empty(0) for name in names)
    return *first, [d[name].contiguous() for name in o.values]


@_scores_backward.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, key_bias: Any, bias: Any, values: Any, *rest: Any) -> Any:
    like = (q if x is None else x for x in (q, k, v, key_bias, bias))
    first = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)
    return (
        *first[:3],
        q.new_empty(0) if key_bias is None else first[3],
        q.new_empty(0) if bias is None else first[4],
        [torch.empty_like(x, memory_format=torch.contiguous_format) for x in values],
    )


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    *arrays, offset, length, scale, p, plan = inputs
    values = arrays[5]
    ctx.rest, ctx.count = (offset, length, scale, p, plan), len(values)
    ctx.save_for_backward(*arrays[:5], *arrays[6:], *values, *output)


def _backward(ctx: Any, d_out: Any, d_level: Any) -> Any:
    saved = ctx.saved_tensors
    arrays, more = saved[:12], saved[12:]
    values, (out, level) = list(more[: ctx.count]), more[ctx.count :]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_level = torch.zeros_like(level) if d_level is None else d_level
    *first, of_values = torch.ops.pdcore.scores_backward(
        *arrays[:5], values, *arrays[5:], *ctx.rest, out, level, d_out, d_level
    )
    first = [g if x is not None else None for g, x in zip(first, arrays[:5], strict=True)]
    return (*first, of_values, *(None,) * 12)


torch.library.register_autograd("pdcore::scores", _backward, setup_context=_keep_for_backward)
