"""Kernels with one planted defect each, and what catches it; each has a correct twin."""

from __future__ import annotations

from .registry import DEFECTS, Defect

__all__ = ["DEFECTS", "Defect"]
