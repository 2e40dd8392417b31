"""A computation with PyTorch's own gradient inside a `torch.autograd.Function`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Inner", "begun"]

#: Gives a tuple of Tensor.
Compute = Callable[..., tuple[Tensor, ...]]


class Inner:
    """The record of one computation, from which gradients are taken once.

    Parameters
    ----------
    compute : callable
        Gives a tuple of Tensor.
    *arrays : Tensor or None
        Its arguments.

    Attributes
    ----------
    results : tuple of Tensor
        What it gives, recorded.
    """

    def __init__(self, compute: Compute, *arrays: Tensor | None) -> None:
        with torch.enable_grad():
            self._arrays = [None if x is None else x.detach().requires_grad_() for x in arrays]
            self.results = compute(*self._arrays)

    def pull_back(self, *cotangents: Tensor) -> Sequence[Any]:
        """Give the gradients with respect to all arguments, None for None."""
        roots = [x for x in self._arrays if x is not None]
        grads = iter(torch.autograd.grad(self.results, roots, cotangents, allow_unused=True))
        return [None if x is None else next(grads) for x in self._arrays]


def begun(compute: Compute, *arrays: Tensor | None) -> tuple[Inner | None, tuple[Tensor, ...]]:
    """Compute in the forward of a Function, recorded where the record may stay until its backward.

    Where hooks take what is saved for gradients, as checkpointing does, a record would keep it all
    the same; so there is none, and the backward computes again what it needs.

    Returns
    -------
    record : Inner or None
    results : tuple of Tensor
        Without the record.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None, compute(*arrays)
    record = Inner(compute, *arrays)
    return record, tuple(x.detach() for x in record.results)
