"""The contraction by scores in blocks, with its pullback, in O(N + M) memory.

It computes what no fused kernel does: windows, softcap and other maps of the scores, one offset
for each sequence, the gradient of a bias, the log-sum-exp, and dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdcore.extend import Operands, Scores, compiling, scores, scores_vjp

from . import namespace as xp
from .flash import recorded, transformed
from .operators import BLOCKS, traced_scores

__all__ = ["blocked_scores"]


def blocked_scores(c: Scores, o: Operands) -> tuple[Tensor, Tensor]:
    """Contract by scores, see `score_contraction.scores`."""
    arrays = (o.q, o.k, o.v, o.key_bias, o.bias, *o.values.values())
    query_block, key_block = BLOCKS
    if compiling() and c.choice is not None and not transformed():
        return traced_scores(o, c.choice.plan)
    if compiling() or transformed() or not recorded(*arrays):
        return scores(c, o, xp=xp, query_block=query_block, key_block=key_block)
    names = tuple(o.values)
    fixed = o._replace(q=None, k=None, v=None, key_bias=None, bias=None, values={})
    results: tuple[Tensor, Tensor] = _Recomputed.apply(c, fixed, BLOCKS, names, *arrays)
    return results


class _Recomputed(torch.autograd.Function):  # type: ignore[misc]
    """The contraction, whose pullback computes the (N, M) weights again, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        c: Scores,
        fixed: Operands,
        size: tuple[int, int],
        names: tuple[str, ...],
        *arrays: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.c, ctx.fixed, ctx.size, ctx.names = c, fixed, size, names
        out, level = scores(
            c, _with_arrays(fixed, names, arrays), xp=xp, query_block=size[0], key_block=size[1]
        )
        ctx.save_for_backward(*arrays, out, level)
        return out, level

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        *arrays, out, level = ctx.saved_tensors
        o = _with_arrays(ctx.fixed, ctx.names, arrays)
        grads = scores_vjp(
            ctx.c, o, out, level, *d, xp=xp, query_block=ctx.size[0], key_block=ctx.size[1]
        )
        names = ("q", "k", "v", "key_bias", "bias", *ctx.names)
        return (None,) * 4 + tuple(grads.get(name) for name in names)


def _with_arrays(fixed: Operands, names: tuple[str, ...], arrays: Any) -> Operands:
    """Return the operands with the arrays that have a gradient put back."""
    q, k, v, key_bias, bias, *values = arrays
    return fixed._replace(
        q=q, k=k, v=v, key_bias=key_bias, bias=bias, values=dict(zip(names, values, strict=True))
    )
