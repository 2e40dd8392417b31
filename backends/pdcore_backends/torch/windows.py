"""Softmax attention in a window on the CPU: the fused kernel on blocks of rows and their keys.

Rows whose windows lie within the sequence are cut into blocks. The keys of all blocks are one
strided view, on which the kernel runs as on so many heads. Rows near either end of the sequence
run in blocks of their own, with the keys that exist. Shapes as in `.flash`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdcore.extend import Operands, Scores, Support, Visibility, all_of, scores_vjp

from . import namespace as xp
from .flash import on_cpu, one_width, pull_back_on_cpu, recorded, with_cotangents
from .operators import BLOCKS

__all__ = ["BLOCK", "Window", "attend_in_window"]

#: Rows of a block, the fewest that the kernel multiplies at a time.
BLOCK = 32
#: The same for gradients, and for those of a wide window: fewer blocks have fewer keys to sum.
BLOCK_OF_GRADIENT, BLOCK_OF_WIDE = 64, 256
#: The positions of a window from which the window is wide.
WIDE = 384
#: Rows of a block near an end of the sequence.
EDGE = 256
#: The most keys, counted once for each block, of one call of the kernel, for memory of O(N + M).
MOST_KEYS = 2**14


class Part(NamedTuple):
    """Consecutive blocks of rows, with the keys of each.

    Attributes
    ----------
    row, rows, blocks : int
        The first row, the rows of a block, and the number of blocks.
    key, keys : int
        The first key of the first block, and the keys of a block, which may be 0; every block
        begins `rows` keys after the one before.
    """

    row: int
    rows: int
    blocks: int
    key: int
    keys: int


class Window(NamedTuple):
    """The window of a call: row i sees the keys i + offset - left to i + offset + ahead.

    Attributes
    ----------
    left, ahead : int or inf
        The keys before and after the position of a row.
    offset : int
        The position of row 0.
    """

    left: float
    ahead: float
    offset: int

    def block_of_gradient(self) -> int:
        """Return the rows of a block for gradients."""
        return BLOCK_OF_GRADIENT if self.left + self.ahead < WIDE else BLOCK_OF_WIDE

    def parts(self, rows: int, keys: int, size: int) -> list[Part]:
        """Cut the rows into parts, of blocks of `size` rows where windows lie in the sequence."""
        span = self.left + self.ahead
        first = min(max(self.left - self.offset, 0), rows)
        last = max(min(keys - self.ahead - self.offset, rows), first)
        count = int((last - first) // size)
        if count < 2:
            return self._edge(0, rows, keys)
        most = max(1, int(MOST_KEYS // (size + span)))
        inner = [
            Part(
                int(first) + start * size,
                size,
                min(most, count - start),
                int(first - self.left) + start * size + self.offset,
                size + int(span),
            )
            for start in range(0, count, most)
        ]
        rest = int(first) + count * size
        return [*self._edge(0, int(first), keys), *inner, *self._edge(rest, rows, keys)]

    def _edge(self, start: int, stop: int, keys: int) -> list[Part]:
        """Cut rows into parts of one block, with the keys that exist."""
        parts = []
        for row in range(start, stop, EDGE):
            end = min(row + EDGE, stop)
            low = max(row + self.offset - self.left, 0)
            high = min(end + self.offset + self.ahead, keys)
            parts.append(Part(row, end - row, 1, int(min(low, keys)), int(max(high - low, 0))))
        return parts

    def seen(self, part: Part, device: Any) -> Tensor | None:
        """Return which keys of a block its rows see, (rows, keys); None where they see all."""
        start, last = part.row + self.offset, part.key + part.keys - 1
        if start + part.rows - 1 - self.left <= part.key and last <= start + self.ahead:
            return None
        position = torch.arange(start, start + part.rows, device=device)[:, None]
        away = torch.arange(part.key, last + 1, device=device) - position
        return (away >= -self.left) & (away <= self.ahead)


def attend_in_window(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, *, scale: float, window: Window
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scale q.k) v over the keys of a window, with the log-sum-exp of every row.

    Parameters
    ----------
    q, k, v : Tensor
        As for `.flash.attend`.
    real : bool Tensor (B, M), optional
        True for a real key.
    scale : float
        tau.
    window : Window

    Returns
    -------
    out : Tensor (B, Hq, N, Dv)
        Zeros in a row that sees no key.
    lse : Tensor (B, Hq, N)
        Not defined for a row that sees no key.
    """
    width = v.shape[-1]
    q, k, v = one_width(q, k, v)
    # Sums with an offset near the ends of 64 bits would wrap.
    low, high = Support(left=window.left, right=window.ahead).offsets(q.shape[2], k.shape[2], 1)
    window = window._replace(offset=min(max(window.offset, low), high))
    if recorded(q, k, v):
        out, lse = _Windowed.apply(q, k, v, real, scale, window)
    else:
        out, lse = _forward(q, k, v, real, scale, window)
    return (out if out.shape[-1] == width else out[..., :width]), lse


class _Windowed(torch.autograd.Function):  # type: ignore[misc]
    """The kernel on the parts of a window, with gradients of gradients by array operations."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float, window: Window
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, real, scale, window)
        ctx.save_for_backward(q, k, v, real, out, lse)
        ctx.scale, ctx.window = scale, window
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        d_out, d_lse = d
        q, k, v, real, out, lse = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 6
        if torch.is_grad_enabled():
            pairs = ((d_out, out), (d_lse, lse))
            cotangents = (torch.zeros_like(x) if dx is None else dx for dx, x in pairs)
            results = (out, lse, *cotangents)
            grads = _by_blocks(q, k, v, real, results, ctx.scale, ctx.window)
        else:
            arrays = with_cotangents(q, k, v, out, d_out, d_lse)
            grads = _backward(arrays, lse, real, ctx.scale, ctx.window)
        return (*(x[..., : q.shape[-1]] for x in grads), None, None, None)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float, window: Window
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=xp.accumulation(q))
    parts = window.parts(q.shape[2], k.shape[2], BLOCK)
    for part, at, mask in _calls(parts, window, q, k, real):
        rows, to, level = (_rows_of(x[at], k, part) for x in (q, out, lse[..., None]))
        if not part.keys:
            to.fill_(0.0)
            level.fill_(0.0)
            continue
        keys, values = (_keys_of(x[at], part) for x in (k, v))
        result, sums = on_cpu(rows.flatten(1, 2), keys, values, mask, scale, False)
        to.copy_(result.unflatten(1, to.shape[1:3]))
        level.copy_(sums[..., None].unflatten(1, to.shape[1:3]))
    return out, lse


def _backward(
    arrays: tuple[Tensor, ...], lse: Tensor, real: Tensor | None, scale: float, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, d_out = arrays
    dq = torch.empty_like(q)
    # A key is in several blocks, whose 16-bit gradients are summed in float32.
    dk, dv = (x.new_zeros(x.shape, dtype=xp.accumulation(x)) for x in (k, v))
    parts = window.parts(q.shape[2], k.shape[2], window.block_of_gradient())
    for part, at, mask in _calls(parts, window, q, k, real):
        rows, result, d, level, to = (
            _rows_of(x[at], k, part) for x in (q, out, d_out, lse[..., None], dq)
        )
        if not part.keys:
            to.fill_(0.0)
            continue
        keys, values = (_keys_of(x[at], part) for x in (k, v))
        one, result, d, level = (x.flatten(1, 2) for x in (rows, result, d, level))
        grads = pull_back_on_cpu(
            d, one, keys, values, result, level[..., 0], 0.0, False, attn_mask=mask, scale=scale
        )
        to.copy_(grads[0].unflatten(1, to.shape[1:3]))
        for total, grad in ((dk, grads[1]), (dv, grads[2])):
            _add_keys(total[at], grad, part)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    results: tuple[Tensor, ...],
    scale: float,
    window: Window,
) -> tuple[Tensor, ...]:
    """Pull the cotangents of `results`, which are out, lse, d_out and d_lse, back by array calls.

    These calls can be differentiated again.
    """
    heads, wide = (k.shape[1], -1), xp.accumulation(q)
    key_mask = None if real is None else real[:, None]
    support = Support(left=window.left, right=window.ahead)
    seen = Visibility(
        support, xp, q.shape[2], k.shape[2], 1, window.offset, key_mask, real, None, q.device
    )
    o = Operands(q.unflatten(1, heads).to(wide), k.to(wide), v.to(wide), None, None, {}, seen)
    grouped = (x.unflatten(1, heads).to(wide) for x in results)
    d = scores_vjp(
        Scores(scale=scale), o, *grouped, xp=xp, query_block=BLOCKS[0], key_block=BLOCKS[1]
    )
    return d["q"].flatten(1, 2).to(q.dtype), d["k"].to(k.dtype), d["v"].to(v.dtype)


def _calls(
    parts: list[Part], window: Window, q: Tensor, k: Tensor, real: Tensor | None
) -> Iterator[tuple[Part, slice, Tensor | None]]:
    """Return the calls of the kernel: a part, its sequences, and what is added to its scores.

    The blocks of a part are heads of the kernel, so that only one sequence fits into a call.
    """
    group = q.shape[1] // k.shape[1]
    for part in parts:
        seen = window.seen(part, q.device)
        mask = _added(seen, None, q) if real is None else None
        whole = [slice(None)] if part.blocks == 1 else [slice(b, b + 1) for b in range(len(q))]
        for at in whole:
            if real is not None:
                blocks = _keys_of(real[at, None, :, None], part)[..., 0]
                if part.blocks > 1:
                    blocks = blocks.repeat_interleave(group, 1)
                mask = _added(seen, blocks[..., None, :], q)
            yield part, at, mask


def _added(seen: Tensor | None, real: Tensor | None, q: Tensor) -> Tensor | None:
    """Return 0 where a key is real and seen, and -inf elsewhere, with four axes."""
    parts = [x for x in (seen, real) if x is not None]
    if not parts:
        return None
    mask = torch.where(all_of(parts), q.new_zeros(()), -torch.inf)
    return mask[None, None] if mask.ndim == 2 else mask


def _rows_of(x: Tensor, k: Tensor, part: Part) -> Tensor:
    """Return a view of rows by blocks, (B, Hq, 1, rows, D) or (H, blocks, G, rows, D) for B = 1."""
    x = x[:, :, part.row : part.row + part.rows * part.blocks]
    if part.blocks == 1:
        return x[:, :, None]
    blocks = x[0].unflatten(0, (k.shape[1], -1)).unflatten(2, (part.blocks, part.rows))
    return blocks.transpose(1, 2)


def _keys_of(x: Tensor, part: Part) -> Tensor:
    """Return a view of keys by blocks, (B, H, keys, D) or (H, blocks, keys, D) for B = 1."""
    x = x[:, :, part.key :]
    if part.blocks == 1:
        return x[:, :, : part.keys]
    head, key, feature = x.stride()[1:]
    shape = (x.shape[1], part.blocks, part.keys, x.shape[-1])
    return x.as_strided(shape, (head, part.rows * key, key, feature))


def _add_keys(total: Tensor, grad: Tensor, part: Part) -> None:
    """Add the gradients of blocks of keys, which overlap, in slices that do not."""
    for start in range(0, part.keys, part.rows if part.blocks > 1 else part.keys):
        stop = min(start + part.rows, part.keys) if part.blocks > 1 else part.keys
        piece = part._replace(key=part.key + start, keys=stop - start)
        _keys_of(total, piece).add_(grad[:, :, start:stop])
