"""The normalizations of the literature beside the paper's, by their formulas: part of the oracle.

As in `pdcore.reference`: one head at a time, direct formulas, any array library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .instance_enhanced import InstanceEnhanced
from .reference_inputs import select

__all__ = ["instance_enhanced", "moments"]


def moments(x: Any, included: Any, axes: Any, xp: Any) -> tuple[Any, Any]:
    """Take the mean and the biased variance over the included entries; 0 where there are none."""
    included = xp.broadcast_to(included, x.shape)
    count = xp.sum(xp.astype(included, x.dtype), axis=axes, keepdims=True)
    count = select(count > 0, count, 1.0, xp)
    mean = xp.sum(select(included, x, 0.0, xp), axis=axes, keepdims=True) / count
    deviation = select(included, x - mean, 0.0, xp)
    return mean, xp.sum(deviation * deviation, axis=axes, keepdims=True) / count


def instance_enhanced(
    t: InstanceEnhanced, keys: Any, real: Any, params: Mapping[str, Any], xp: Any
) -> Callable[[Any], Any]:
    """Give T for one head, from its pooled keys (*B, W, D); real (*B, W)."""
    mean, var = moments(keys, real[..., None], -2, xp)
    z = params["slope"] * mean + params["shift"]
    small = xp.exp(-xp.abs(z))  # of the two forms of the sigmoid the one that does not overflow
    gate = select(z < 0, small / (1.0 + small), 1.0 / (1.0 + small), xp)
    return lambda x: gate * ((x - t.beta * mean) / xp.sqrt(var + t.eps))
