"""Rows of the gaussian and the cosine kernel in fewer passes over memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pdcore.extend import (
    GaussianRows,
    Plan,
    Pullback,
    Rows,
    UnitRows,
    central,
    compiling,
    overflow_as_nan,
)

from .flash import recorded, transformed

__all__ = ["chosen_rows"]

#: Lengths of rows in this range have squares that neither overflow nor vanish.
SHORTEST, LONGEST = 1e-15, 1e15


def chosen_rows(plan: Plan, *, level: bool) -> Plan:
    """Choose this backend's own transforms for the gaussian and the cosine kernel on the CPU.

    `level` tells whether L is read, and with it row constants.
    """
    steps = tuple(_chosen(step, level) for step in plan.transforms)
    return replace(plan, transforms=steps)


def _chosen(step: Any, level: bool) -> Any:
    if isinstance(step, GaussianRows) and not level:
        return replace(step, choice=KeyDistances(step))
    if isinstance(step, UnitRows):
        return replace(step, choice=UnitRowsOnce(step))
    return step


@dataclass(frozen=True)
class KeyDistances:
    """`GaussianRows` without the row constant, which cancels where L is not read."""

    step: GaussianRows

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback."""
        if compiling() or transformed():
            return self.step(rows, state, params, xp=xp)
        shift = central(rows.k.detach(), rows.key_mask, xp=xp)
        q, k = rows.q - shift, rows.k - shift
        square = _SquaredLength.apply(k) if recorded(k) else _squared_length(k)
        bias = overflow_as_nan(-self.step.gamma * square, xp)
        return rows._replace(q=q, k=k, key_bias=bias), _no_pullback


@dataclass(frozen=True)
class UnitRowsOnce:
    """`UnitRows` by the length of each row, where no square overflows or vanishes."""

    step: UnitRows

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback."""
        if compiling() or transformed():
            return self.step(rows, state, params, xp=xp)
        both = (_lengths(x.detach()) for x in (rows.q, rows.k))
        of_queries, of_keys = both
        if of_queries is None or of_keys is None:
            return self.step(rows, state, params, xp=xp)
        pairs = ((rows.q, of_queries), (rows.k, of_keys))
        units = [_Unit.apply(x, n) if recorded(x) else x / n for x, n in pairs]

        def pullback(d: Rows) -> Any:
            grads = (
                _along_sphere(u, g) / n
                for u, n, g in zip(units, (of_queries, of_keys), (d.q, d.k), strict=True)
            )
            return Rows(*grads), {}, {}

        return rows._replace(q=units[0], k=units[1]), pullback


def _no_pullback(d: Rows) -> Any:
    raise AssertionError("a call with a pullback reads L")


def _squared_length(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1)
    return length * length


class _SquaredLength(torch.autograd.Function):  # type: ignore[misc]
    """|x|^2, whose gradient is one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _squared_length(x)

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        [x] = ctx.saved_tensors
        return x * (2.0 * d[0])[..., None]


def _lengths(x: Tensor) -> Tensor | None:
    """Return the length of every row, (..., 1); None unless all lengths are of ordinary size."""
    # A tensor of a subclass, such as a fake one, may have no values to read.
    if type(x) is not Tensor or not x.numel():
        return None
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    least, most = lengths.aminmax()
    return lengths if least.item() >= SHORTEST and most.item() <= LONGEST else None


class _Unit(torch.autograd.Function):  # type: ignore[misc]
    """x / |x|, whose gradient reads only the result and the lengths."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor) -> Tensor:
        unit = x / lengths
        ctx.save_for_backward(x, unit, lengths)
        return unit

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        x, unit, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():
            lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return _along_sphere(unit, d[0]) / lengths, None
        return _along_sphere(unit, d[0]).mul_(1.0 / lengths), None


def _along_sphere(unit: Tensor, g: Tensor) -> Tensor:
    """Return the part of g that is at right angles to the unit vectors."""
    return torch.addcmul(g, unit, (unit * g).sum(-1, keepdim=True), value=-1.0)
