"""Derivation of an attention from a layer: the regression, its dual and the expansion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..moved import attribute as _attribute
from .layers import LAYERS, Derivation, derive

__all__ = [
    "Derivation",
    "LAYERS",
    "derive",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return _attribute(__name__, name)  # a name of 0.1
