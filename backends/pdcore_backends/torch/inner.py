"""A computation with PyTorch's own gradient inside a `torch.autograd.Function`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["Inner"]


class Inner:
    """The record of one computation, from which gradients are taken once.

    It holds no tensor: its ends are edges, and what it saves goes through the hooks for saved
    tensors. So checkpointing drops it, and keeps nothing alive outside of what it computes again.

    Parameters
    ----------
    compute : callable
        Gives a tuple of Tensor.
    *arrays : Tensor or None
        Its arguments.

    Attributes
    ----------
    results : tuple of Tensor
        Without the record. Taken out by whoever keeps the object.
    """

    def __init__(self, compute: Callable[..., tuple[Tensor, ...]], *arrays: Tensor | None) -> None:
        with torch.enable_grad():
            anchor = torch.zeros((), requires_grad=True)
            roots = [None if x is None else _Root.apply(anchor, x) for x in arrays]
            found = compute(*roots)
        self._given = [x is not None for x in roots]
        self._roots = [get_gradient_edge(x) for x in roots if x is not None]
        self._ends = [get_gradient_edge(x) for x in found]
        self.results = tuple(x.detach() for x in found)

    def pull_back(self, *cotangents: Tensor) -> Sequence[Any]:
        """Give the gradients with respect to all arguments, None for None."""
        grads = iter(torch.autograd.grad(self._ends, self._roots, cotangents, allow_unused=True))
        return [next(grads) if given else None for given in self._given]


class _Root(torch.autograd.Function):  # type: ignore[misc]
    """Gives a tensor a record to begin with, which does not hold the tensor as a leaf would."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        return None, None
