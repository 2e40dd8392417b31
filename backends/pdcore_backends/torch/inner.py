"""A computation with PyTorch's own gradient inside a `torch.autograd.Function`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Inner", "run_inner"]

Compute = Callable[..., tuple[Tensor, ...]]


class Inner:
    """The autograd record of one computation, which serves one backward pass.

    Parameters
    ----------
    compute : callable
        Returns a tuple of Tensor.
    *arrays : Tensor or None
        The arguments of `compute`.

    Attributes
    ----------
    results : tuple of Tensor
        The recorded results of `compute`.
    """

    def __init__(self, compute: Compute, *arrays: Tensor | None) -> None:
        with torch.enable_grad():
            self._arrays = [None if x is None else x.detach().requires_grad_() for x in arrays]
            self.results = compute(*self._arrays)

    def pull_back(self, *cotangents: Tensor) -> Sequence[Any]:
        """Return the gradients with respect to all arguments, None for an argument None."""
        roots = [x for x in self._arrays if x is not None]
        grads = iter(torch.autograd.grad(self.results, roots, cotangents, allow_unused=True))
        return [None if x is None else next(grads) for x in self._arrays]


def run_inner(compute: Compute, *arrays: Tensor | None) -> tuple[Inner | None, tuple[Tensor, ...]]:
    """Compute in the forward of a `torch.autograd.Function`, and record unless hooks forbid it.

    Checkpointing and the like hook into saved tensors so as not to keep them. A record would keep
    them all the same, so under such hooks nothing is recorded, and the backward pass computes the
    forward pass again.

    Returns
    -------
    record : Inner or None
    results : tuple of Tensor
        Detached from the record.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None, compute(*arrays)
    record = Inner(compute, *arrays)
    return record, tuple(x.detach() for x in record.results)
