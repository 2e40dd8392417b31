"""The oracle: the specification computed by its formulas, in array-API calls."""

from __future__ import annotations

from .attention import reference_attention, reference_weights
from .normalizations import reference_keys

__all__ = [
    "reference_attention",
    "reference_keys",
    "reference_weights",
]
