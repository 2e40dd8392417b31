"""Calls in a trace of ``torch.jit.trace``, which has no loops: those over lengths are unrolled."""

from __future__ import annotations

import torch
from torch import Tensor

from pdcore.extend import Features, Inputs, Plan, untraced

from .operators import BLOCKS

__all__ = ["with_fixed_lengths"]


def with_fixed_lengths(plan: Plan, inputs: Inputs, *, weights: bool = False) -> Inputs:
    """Make a TorchScript trace raise for other lengths than its own, if it is wrong for them.

    Pooling, prefix statistics and causal features run in loops over windows or chunks; weights,
    and counts of the keys that a mask leaves, in loops over blocks. All other traces are valid for
    any lengths.
    """
    if not torch.jit.is_tracing():
        return inputs
    loops = plan.pools or plan.prefix
    loops = loops or (isinstance(plan.contraction, Features) and plan.support.causal)
    counted = inputs.mask is not None or inputs.bias is not None
    if weights or (counted and plan.normaliser != "sum"):
        with untraced():
            loops = loops or max(inputs.q.shape[-2], inputs.k.shape[-2]) > BLOCKS[0]
    if not loops:
        return inputs
    return inputs._replace(q=_fixed(inputs.q), k=_fixed(inputs.k))


def _fixed(x: Tensor) -> Tensor:
    """Record in the trace that `x` has its present length."""
    with untraced():
        length = x.shape[-2]
    return x.expand(*(-1,) * (x.ndim - 2), length, -1)
