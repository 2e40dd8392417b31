"""The scale of features, by which products of small features stay in the dtype's range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..arrays import constant
from ..spec import FeatureMap, FeatureScale
from .plan import Transform
from .transforms import Gradients, Pullback, Rows

__all__ = ["ScaledRows", "largest_entry", "largest_key", "scaled"]


@dataclass(frozen=True)
class ScaledRows:
    """The scale of features, of a row in queries and of a head in keys.

    See `FeatureMap.feature_scale`. The scale cancels in the output. Without it, features below the
    square root of the dtype's smallest number would have products of 0.

    Attributes
    ----------
    kernel : FeatureMap
        phi.
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    kernel: FeatureMap
    choice: Transform | None = None

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback; see `Rows`."""
        largest = state.get("largest")  # a decoder carries that of all keys so far
        if largest is None:
            largest = largest_key(rows.k, rows.key_mask, xp=xp)
        return self.below(largest, rows, xp=xp)

    def below(self, largest: Any, rows: Rows, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform with the largest entry of keys, (*B, H, 1, 1), for backends that find it."""
        q, of_queries = scaled(self.kernel, rows.q, largest_entry(rows.q, xp=xp), xp=xp)
        k, of_keys = scaled(self.kernel, rows.k, largest, xp=xp)

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            # Scales count as constants, as the result does not depend on them.
            grads = [
                dx if of.divisor is None else dx / of.divisor
                for dx, of in ((d.q, of_queries), (d.k, of_keys))
            ]
            return Rows(*grads), {}, {}

        constant = (of_queries.log + of_keys.log)[..., 0]
        return rows._replace(q=q, k=k, row_constant=constant), pullback


def scaled(phi: FeatureMap, x: Any, largest: Any, *, xp: Any) -> tuple[Any, FeatureScale]:
    """Return rows such that phi of them is phi(x) over a scale, and the scale."""
    scale = phi.feature_scale(largest, xp=xp)
    x = x if scale.shift is None else x - scale.shift
    return (x if scale.divisor is None else x / scale.divisor), scale


def largest_entry(x: Any, *, xp: Any) -> Any:
    """Return the largest entry of each row, (..., R, 1), as a constant; 0 of none."""
    x = constant(x, xp)
    reduce = xp.max if x.shape[-1] else xp.sum
    return reduce(x, axis=-1, keepdims=True)


def largest_key(k: Any, mask: Any, *, xp: Any) -> Any:
    """Return the largest entry of the real keys of each head, (*B, H, 1, 1), as a constant."""
    if not (k.shape[-2] and k.shape[-1]):
        return xp.sum(k, axis=(-2, -1), keepdims=True)
    if mask is None:
        return xp.max(constant(k, xp), axis=(-2, -1), keepdims=True)
    top = largest_entry(k, xp=xp)
    top = xp.where(mask[..., None], top, xp.full_like(top, -math.inf))
    return xp.max(top, axis=-2, keepdims=True)
