"""Softmax attention with terms of positions and labels on the CPU, by the fused kernel.

A block of rows is one call of the kernel, with the keys that the rows see, to whose scores terms
are added. Terms of distances alone are equal along the diagonals of a block: with the rows in
descending order, one line of them is the whole block, as a view in which each row begins one entry
later. Causal rows and windows are terms of distances too, of 0 and -inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pdcore.extend import (
    DISTANCE,
    Operands,
    Scores,
    compiling,
    log_kappa,
    scores_vjp,
)

from . import namespace as xp
from .flash import on_cpu, one_width, pull_back_on_cpu, recorded, transformed, with_cotangents
from .kernels import widened
from .operators import BLOCKS

__all__ = ["linear_scale", "scores_with_terms"]

#: Rows of a block, the fewest and the most; whole blocks have at most MOST entries of terms.
LEAST, ROWS, MOST = 32, 256, 2**21


def linear_scale(c: Scores) -> float | None:
    """Return tau where log kappa is tau s plus terms that do not depend on s; otherwise None."""
    if c.expression is None:
        return None
    slope = c.expression.derivative("s").value  # the name of an input is a string
    return slope if isinstance(slope, float) else None


def scores_with_terms(c: Scores, o: Operands) -> tuple[Tensor, Tensor] | None:
    """Contract by scores, see `score_contraction.scores`; None where other code has to."""
    seen = o.visibility
    if compiling() or transformed() or not seen.static or o.dropout is not None:
        return None
    if recorded(o.bias, *o.values.values()) or o.key_bias is not None:
        return None
    if not all(o.q.shape) or not all(o.k.shape) or not o.v.shape[-1]:
        return None
    fixed = o._replace(q=None, k=None, v=None)
    if recorded(o.q, o.k, o.v):
        out, lse, none = _WithTerms.apply(c, fixed, o.q, o.k, o.v)
    else:
        out, lse, none = _forward(c, o)
    return out, torch.where(none, -torch.inf, lse)


class _WithTerms(torch.autograd.Function):  # type: ignore[misc]
    """The kernel on blocks of rows, with gradients of gradients by array operations."""

    @staticmethod
    def forward(
        ctx: Any, c: Scores, fixed: Operands, *arrays: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.c, ctx.fixed = c, fixed
        out, lse, none = _forward(c, _with_arrays(fixed, arrays))
        ctx.save_for_backward(*arrays, out, lse, none)
        ctx.mark_non_differentiable(none)
        ctx.set_materialize_grads(False)
        return out, lse, none

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        d_out, d_lse, _ = d
        *arrays, out, lse, none = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 5
        o = _with_arrays(ctx.fixed, arrays)
        if not torch.is_grad_enabled():
            return (None, None, *_backward(ctx.c, o, out, lse, d_out, d_lse))
        level = torch.where(none, -torch.inf, lse)
        pairs = ((d_out, out), (d_lse, level))
        cotangents = (torch.zeros_like(x) if dx is None else dx for dx, x in pairs)
        grads = scores_vjp(
            ctx.c, o, out, level, *cotangents, xp=xp, query_block=BLOCKS[0], key_block=BLOCKS[1]
        )
        return (None, None, grads["q"], grads["k"], grads["v"])


def _with_arrays(fixed: Operands, arrays: Any) -> Operands:
    q, k, v = arrays
    return fixed._replace(q=q, k=k, v=v)


def _forward(c: Scores, o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out, the log-sum-exp, and which rows see no key, whose log-sum-exp is not defined."""
    q, k, v = one_width(*_flat(o))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    none = torch.zeros(q.shape[:-1], dtype=torch.bool)
    for rows, keys, mask, turned in _blocks(c, o, q.shape[1]):
        if mask is None:
            out[:, :, rows], lse[:, :, rows], none[:, :, rows] = 0.0, 0.0, True
            continue
        one = q[:, :, rows]
        result = on_cpu(
            one.flip(-2) if turned else one,
            k[:, :, keys],
            v[:, :, keys],
            mask,
            c.choice.scale,
            False,
        )
        hidden = (mask.amax(-1) == -torch.inf).expand(one.shape[:-1])
        for to, x in zip((out, lse, none), (*result, hidden), strict=True):
            to[:, :, rows] = x.flip(2) if turned else x
    width = o.v.shape[-1]
    shape = o.q.shape[:-1]
    return out[..., :width].reshape(*shape, width), lse.reshape(shape), none.reshape(shape)


def _backward(
    c: Scores, o: Operands, out: Tensor, lse: Tensor, d_out: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor, ...]:
    q, k, v = one_width(*_flat(o))
    dims, heads = q.shape[-1], q.shape[1]
    out, d_out = (
        None if x is None else widened(x.reshape(*q.shape[:-1], -1), dims) for x in (out, d_out)
    )
    d_lse = None if d_lse is None else d_lse.reshape(q.shape[:-1])
    q, k, v, out, d_out = with_cotangents(q, k, v, out, d_out, d_lse)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    level = lse.reshape(q.shape[:-1])
    for rows, keys, mask, turned in _blocks(c, o, heads):
        if mask is None:
            dq[:, :, rows] = 0.0
            continue
        cut = (x[:, :, rows] for x in (d_out, q, out, level))
        d, one, result, sums = (x.flip(2) if turned else x for x in cut)
        grads = pull_back_on_cpu(
            d,
            one,
            k[:, :, keys],
            v[:, :, keys],
            result,
            sums,
            0.0,
            False,
            attn_mask=mask,
            scale=c.choice.scale,
        )
        dq[:, :, rows] = grads[0].flip(2) if turned else grads[0]
        dk[:, :, keys] += grads[1]
        dv[:, :, keys] += grads[2]
    grads = zip((dq, dk, dv), (o.q, o.k, o.v), strict=True)
    return tuple(d[..., : x.shape[-1]].reshape(x.shape) for d, x in grads)


def _flat(o: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, Hq, N, D), keys and values with one leading axis."""
    q = o.q.flatten(-4, -3)
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, o.k, o.v))
    return q, k, v


def _blocks(
    c: Scores, o: Operands, heads: int
) -> Iterator[tuple[slice, slice, Tensor | None, bool]]:
    """Return blocks of rows with their keys and terms, and whether the rows are descending.

    The terms are None for rows that see no key by position.
    """
    seen, rows = o.visibility, o.q.shape[-2]
    plain = (seen.mask, seen.key_mask, o.bias) == (None, None, None)
    turned = plain and c.places == (DISTANCE,)
    entries = heads * seen.keys * (1 if seen.key_mask is None else o.k.shape[:-3].numel())
    size = ROWS if turned else max(LEAST, min(ROWS, MOST // max(entries, 1) // LEAST * LEAST))
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        first, last = seen.key_range(start, stop)
        block = (start, stop, first, last)
        terms = None
        if first < last:
            terms = _line(c, o, block) if turned else _terms(c, o, block, heads)
        yield slice(start, stop), slice(first, last), terms, turned


def _line(c: Scores, o: Operands, block: tuple[int, int, int, int]) -> Tensor:
    """Return the terms of distances of a block whose rows are descending, (1, Hq, rows, keys)."""
    start, stop, first, last = block
    seen, rows, keys = o.visibility, stop - start, last - first
    # One row that sees the diagonals of the block.
    one: Any = _OneRow(seen, first - (stop - 1) - seen.offset, rows + keys - 1)
    line = _added(c, o._replace(visibility=one), (0, 1, 0, rows + keys - 1))
    line = torch.where(one.seen(), line, -torch.inf)
    group = o.q.shape[-4:-2]
    line = line.reshape(-1, *line.shape[-4:])[0] if line.ndim > 4 else line
    line = line.expand(*group, 1, -1).reshape(1, -1, rows + keys - 1).contiguous()
    count = line.shape[1]
    return line.as_strided((1, count, rows, keys), (count * line.shape[2], line.shape[2], 1, 1))


class _OneRow:
    """The distances of the diagonals of a block, as those of one row."""

    def __init__(self, of: Any, least: int, count: int) -> None:
        self.of, self.line = of, torch.arange(least, least + count)[None]

    def place(self, name: str, start: int, stop: int, first: int, last: int) -> Tensor:
        """Return p_j - p_i, (1, keys), see `Visibility.place`."""
        return self.line

    def oriented(self, x: Any) -> Any:
        """Return an array as it is, see `Visibility.oriented`."""
        return x

    def seen(self) -> Tensor:
        """Return which distances causal and window allow."""
        support = self.of.support
        return (self.line <= support.ahead) & (self.line >= -support.left)


def _terms(c: Scores, o: Operands, block: tuple[int, int, int, int], heads: int) -> Tensor:
    """Return what is added to the scores of a block, (B or 1, Hq, rows, keys)."""
    start, stop, first, last = block
    added = _added(c, o, block)
    if o.bias is not None:
        added = added + log_kappa.tile(o.bias, *block)
    visible = o.visibility.block(*block)
    if visible is not None:
        added = torch.where(visible, added, -torch.inf)
    added = added.reshape(*(1,) * (o.q.ndim - added.ndim), *added.shape)
    lead = o.q.shape[:-4] if any(n != 1 for n in added.shape[:-4]) else added.shape[:-4]
    added = added.expand(*lead, *o.q.shape[-4:-2], stop - start, last - first)
    return added.reshape(-1, heads, *added.shape[-2:])


def _added(c: Scores, o: Operands, block: tuple[int, int, int, int]) -> Tensor:
    """Return log kappa of a block for inner products of 0."""
    assert c.expression is not None
    zero = o.q.new_zeros(())
    result: Tensor = c.expression(log_kappa.inputs(c, zero, o, block, xp=xp), xp)
    return result
