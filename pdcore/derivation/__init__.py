"""The regression behind an attention, in LaTeX."""

from __future__ import annotations

from .layers import LAYERS, Derivation, derive

__all__ = [
    "Derivation",
    "LAYERS",
    "derive",
]
