"""The contraction by scores by FlexAttention: score maps, windows and masks in one compiled kernel.

Causal and window support becomes a block mask, built from ranges of positions without an (N, M)
array and cached by lengths. Everything else that depends on a query and a key (the kernel's map of
the scores, masks, a bias) is part of the score map, which FlexAttention also applies in blocks
that are visible as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.utils._python_dispatch
from torch import Tensor

from pdcore.extend import (
    DISTANCE,
    KEY_LABEL,
    QUERY_LABEL,
    Expression,
    Operands,
    Scores,
    Support,
    Visibility,
    compiling,
    scores_vjp,
)

from . import namespace as xp
from .flash import biased, recorded, transformed
from .inner import Inner, run_inner
from .kernels import widened
from .operators import BLOCKS

__all__ = ["block_mask", "flex_scores"]

#: Queries and keys of a block.
BLOCK = 128
#: The fewest features that the kernels' products accept; shorter rows are padded with zeros.
LEAST = 16


class _Kind(NamedTuple):
    """The key under which a compiled kernel is cached.

    Attributes
    ----------
    expression, scale
        As in `Scores`.
    names : tuple of str
        The scalars per head of the expression.
    group : int
        Query heads of a key head.
    support : Support or None
        The support, where the score map has to apply it because positions are arrays.
    pooled : int
        Keys of a pooling window.
    signature : tuple
        Dtypes, heads and features, so that another signature gets a program of its own instead
        of making PyTorch recompile this one.
    """

    expression: Expression | None
    scale: float
    names: tuple[str, ...]
    group: int
    support: Support | None
    pooled: int
    signature: tuple[Any, ...]


class _Extra(NamedTuple):
    """The arrays that a score map reads.

    Attributes
    ----------
    values : tuple of Tensor (H, G or 1, n, m)
        The scalars per head of the expression, and its tables.
    key_mask : bool Tensor (B, M) or None
    mask, bias : Tensor (B, Hq, N, M) or None
    at : integer Tensor (B,) or None
        The position of query 0.
    labels : tuple of integer Tensors (B, N) and (B, M), or None
    """

    values: tuple[Tensor, ...]
    key_mask: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    at: Tensor | None
    labels: tuple[Tensor, Tensor] | None


def flex_scores(c: Scores, o: Operands) -> tuple[Tensor, Tensor] | None:
    """Contract by scores, see `score_contraction.scores`.

    Returns
    -------
    (out, L) or None
        None where blocks have to run the call (see the steps of `.choice`), and where an array
        is empty.
    """
    if compiling() or transformed() or o.dropout is not None:
        return None
    if not all(o.q.shape) or not all(o.k.shape) or not o.v.shape[-1]:
        return None
    if (
        _in_dispatch_mode()
        or recorded(o.bias, *o.values.values())
        or (o.key_bias is not None and c.expression is not None)
    ):
        return None
    if not recorded(o.q, o.k, o.v, o.key_bias):
        return _run(c, o)
    fixed = o._replace(q=None, k=None, v=None, key_bias=None)
    results: tuple[Tensor, Tensor] = _Flex.apply(c, fixed, o.q, o.k, o.v, o.key_bias)
    return results


def _in_dispatch_mode() -> bool:
    """Check whether a dispatch mode is active, under which FlexAttention would not be compiled."""
    modes = torch.utils._python_dispatch
    active = getattr(modes, "is_in_any_mode_without_ignore_compile_internals", None)
    return bool(torch._C._len_torch_dispatch_stack() if active is None else active())


class _Flex(torch.autograd.Function):  # type: ignore[misc]
    """FlexAttention with its own gradient, and a second derivative by blocks."""

    @staticmethod
    def forward(ctx: Any, c: Scores, fixed: Operands, *arrays: Any) -> tuple[Tensor, Tensor]:
        ctx.c, ctx.fixed = c, fixed
        ctx.inner, (out, level) = run_inner(_Flex.computed(c, fixed), *arrays)
        ctx.save_for_backward(*arrays, out, level)
        return out, level

    @staticmethod
    def computed(c: Scores, fixed: Operands) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return the contraction as a function of the arrays that have a gradient."""
        return lambda *arrays: _run(c, _with_arrays(fixed, *arrays))

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        *arrays, out, level = ctx.saved_tensors
        if torch.is_grad_enabled():
            o = _with_arrays(ctx.fixed, *arrays)
            grads = scores_vjp(
                ctx.c, o, out, level, *d, xp=xp, query_block=BLOCKS[0], key_block=BLOCKS[1]
            )
            return (None, None, *(grads.get(name) for name in ("q", "k", "v", "key_bias")))
        # A record serves one gradient; for another the forward pass runs again.
        inner = ctx.inner or Inner(_Flex.computed(ctx.c, ctx.fixed), *arrays)
        ctx.inner = None
        return (None, None, *inner.pull_back(*d))


def _with_arrays(fixed: Operands, q: Any, k: Any, v: Any, key_bias: Any) -> Operands:
    return fixed._replace(q=q, k=k, v=v, key_bias=key_bias)


def _run(c: Scores, o: Operands) -> tuple[Tensor, Tensor]:
    """Run the compiled kernel on all leading axes at once, and return (out, L)."""
    seen, shape, wide = o.visibility, o.q.shape, o.q.dtype
    group, width, dtype = shape[-3], o.v.shape[-1], getattr(torch, c.choice.dtype)
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (o.q.flatten(-4, -3), o.k, o.v))
    if o.key_bias is not None:
        bias = o.key_bias.reshape(-1, *o.key_bias.shape[-2:]) / c.scale
        q, k = biased(q, k, bias, dtype)
    q, k, v = (widened(x, max(x.shape[-1], LEAST)).to(dtype) for x in (q, k, v))
    placed = seen.support.restricts and seen.static
    blocks = None
    if placed:
        blocks = block_mask(
            seen.support, seen.rows, seen.length, seen.scale, seen.offset, str(q.device)
        )
    extra = _extra(c, o, q.shape[0])
    kind = _Kind(
        c.expression,
        c.scale,
        tuple(o.values),
        group,
        seen.support if seen.support.restricts and not seen.static else None,
        seen.scale,
        (
            c.choice.dtype,
            *q.shape[1::2],
            k.shape[1],
            v.shape[3],
            str(q.device),
            torch.is_grad_enabled(),
            *(tuple(x.shape) for x in extra.values),
            *(x is None for x in (*extra[1:], blocks)),
        ),
    )
    out, level = _program(kind)(q, k, v, extra, blocks)
    level = level.to(wide)
    none = (level == -torch.inf)[..., None]
    out = torch.where(none, 0.0, out[..., :width].to(wide))
    return out.reshape(*shape[:-1], width), level.reshape(shape[:-1])


def _extra(c: Scores, o: Operands, count: int) -> _Extra:
    """Return the arrays of the score map, broadcast to whole axes without copies."""
    seen = o.visibility
    heads = (count, o.q.shape[-4] * o.q.shape[-3])

    def whole(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.expand(*o.q.shape[:-2], *x.shape[-2:]).reshape(*heads, *x.shape[-2:])
        return x.expand(*heads, seen.rows, seen.keys)

    at, lead = None, o.q.shape[:-4]
    if seen.static and DISTANCE in c.places:
        at = torch.full((count,), seen.offset, dtype=torch.int64, device=o.q.device)
    elif not seen.static and (seen.support.restricts or DISTANCE in c.places):
        at = seen.offset.reshape(seen.offset.shape[:-4]).expand(lead).reshape(-1)
    labels = None
    if seen.labels is not None:
        labels = tuple(x.expand(*lead, 1, 1, -1).reshape(count, -1) for x in seen.labels)
    return _Extra(
        tuple(x.detach() for x in o.values.values()),
        None if seen.key_mask is None else seen.key_mask.reshape(-1, seen.keys),
        None if seen.mask is None else whole(seen.by_mask(0, seen.rows, 0, seen.keys)),
        whole(o.bias),
        at,
        labels,
    )


@lru_cache(maxsize=128)
def _program(kind: _Kind) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compile FlexAttention with one score map."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    scale = kind.scale if kind.expression is None else 1.0

    def attend(q: Tensor, k: Tensor, v: Tensor, extra: _Extra, blocks: Any) -> Any:
        def score_mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return _score(kind, extra, s, b, h, i, j)

        out, more = flex_attention(
            q,
            k,
            v,
            score_mod,
            blocks,
            scale=scale,
            enable_gqa=kind.group > 1,
            return_aux=AuxRequest(lse=True),
        )
        return out, more.lse

    # PyTorch limits recompilations by code object, and all closures share one: so copy it.
    copy = FunctionType(
        attend.__code__.replace(),
        attend.__globals__,
        attend.__name__,
        attend.__defaults__,
        attend.__closure__,
    )
    return compiled(copy)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function as one graph, so that no part of it runs uncompiled."""
    program: Callable[..., Any] = torch.compile(function, fullgraph=True)
    return program


def _score(kind: _Kind, extra: _Extra, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Compute log kappa of query i and key j, -inf where the key is not visible."""
    logit = s
    if kind.expression is not None:
        logit = kind.expression(_inputs(kind, extra, s, b, h, i, j), xp)
        if isinstance(logit, float):  # a kernel that does not depend on s
            logit = torch.full_like(s, logit)
    if extra.bias is not None:
        logit = logit + extra.bias[b, h, i, j]
    if extra.key_mask is not None:
        logit = torch.where(extra.key_mask[b, j], logit, -torch.inf)
    if extra.mask is not None:
        logit = torch.where(extra.mask[b, h, i, j], logit, -torch.inf)
    if extra.at is not None and kind.support is not None:
        seen = _position(kind.support, kind.pooled, extra.at[b], i, j)
        logit = torch.where(seen, logit, -torch.inf)
    return logit


def _inputs(kind: _Kind, extra: _Extra, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Return the inputs of log kappa of query i and key j, see `log_kappa.inputs`."""
    assert kind.expression is not None
    places = {}
    if extra.at is not None:
        places[DISTANCE] = (j - i - extra.at[b]).to(s.dtype)
    if extra.labels is not None:
        of_queries, of_keys = extra.labels
        places[QUERY_LABEL] = of_queries[b, i].to(s.dtype)
        places[KEY_LABEL] = of_keys[b, j].to(s.dtype)
    tables = dict(zip(kind.names, extra.values, strict=True))

    def read(table: Tensor, *index: Any) -> Any:
        key_head = h // kind.group if table.shape[0] > 1 else 0 * h
        member = h % kind.group if table.shape[1] > 1 else 0 * h
        return table[key_head, member, index[-2] if index[1:] else 0 * h, index[-1]]

    values: dict[Any, Any] = {"s": s, **places}
    values |= {name: read(x, 0 * h) for name, x in tables.items() if x.shape[-1] == 1}
    for entry in kind.expression.entries:
        table = tables[entry.table]
        index: list[Any] = []
        for at, size in zip(entry.args[:0:-1], reversed(table.shape), strict=False):
            place = torch.floor(at({name: places[name] for name in at.inputs}, xp))
            index.insert(0, place.clamp(0, size - 1).to(torch.int64))
        values[entry] = read(table, *index)
    return values


def _position(support: Support, pooled: int, at: Any, i: Any, j: Any) -> Any:
    """Check whether query i sees key j by position, see `Visibility.by_position`."""
    seen = None
    if support.ahead != math.inf:
        seen = (j + 1) * pooled - 1 <= i + at + int(support.ahead)
    if support.left != math.inf:
        near = j * pooled >= i + at - int(support.left)
        seen = near if seen is None else seen & near
    return seen


@lru_cache(maxsize=16)
def block_mask(
    support: Support, rows: int, length: int, scale: int, offset: int, device: str
) -> Any:
    """Build FlexAttention's block mask for causal and window support.

    Parameters
    ----------
    support, rows, length, scale, offset, device
        As in `Visibility`, with the offset an int.

    Returns
    -------
    BlockMask
    """
    from torch.nn.attention.flex_attention import BlockMask

    seen = Visibility(support, xp, rows, length, scale, offset, None, None, None, device)
    parts, wholes = [], []
    for start in range(0, rows, BLOCK):
        part, whole = _blocks(seen, start, min(start + BLOCK, rows))
        parts.append(part)
        wholes.append(whole)
    # Not inference tensors: the mask is cached, and a later call may save it for its gradient.
    with torch.inference_mode(False), torch.no_grad():
        at = torch.tensor(offset, dtype=torch.int32, device=device)

        def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
            return _position(support, scale, at, i, j)

        columns = -(-seen.keys // BLOCK)
        return BlockMask.from_kv_blocks(
            *_block_table(parts, columns, device),
            *_block_table(wholes, columns, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(rows, seen.keys),
        )


def _blocks(seen: Visibility, start: int, stop: int) -> tuple[list[int], list[int]]:
    """List the blocks of keys that queries ``start:stop`` see in part, and as a whole."""
    first, last = seen.key_range(start, stop)
    low, high = first // BLOCK, -(-last // BLOCK) if last > first else first // BLOCK
    a, b = low, high if stop - start == BLOCK else low

    def whole(block: int) -> bool:
        end = (block + 1) * BLOCK
        return end <= seen.keys and seen.whole(start, stop, block * BLOCK, end)

    while a < b and not whole(a):
        a += 1
    while a < b and not whole(b - 1):
        b -= 1
    return [*range(low, a), *range(b, high)], list(range(a, b))


def _block_table(blocks: list[list[int]], columns: int, device: str) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each row of blocks has, (1, 1, R), and which, (1, 1, R, C)."""
    count = torch.tensor([len(row) for row in blocks], dtype=torch.int32)
    index = torch.zeros(len(blocks), columns, dtype=torch.int32)
    for row, columns_seen in zip(index, blocks, strict=True):
        row[: len(columns_seen)] = torch.tensor(columns_seen, dtype=torch.int32)
    return count[None, None].to(device), index[None, None].to(device)
