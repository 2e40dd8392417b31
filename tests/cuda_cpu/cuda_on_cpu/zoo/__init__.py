"""Kernels with one planted defect each, the same kernels without it, and their detectors."""

from __future__ import annotations

from .registry import DEFECTS, Defect

__all__ = ["DEFECTS", "Defect"]
