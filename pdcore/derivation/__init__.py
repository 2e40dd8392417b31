"""Derivation of an attention from a layer: the regression, its dual and the expansion."""

from __future__ import annotations

from .layers import LAYERS, Derivation, derive

__all__ = [
    "Derivation",
    "LAYERS",
    "derive",
]
