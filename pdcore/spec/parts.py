"""Checks of the parts of a spec: their classes, their fields and their parameters."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..errors import UnsupportedError
from .kernel_base import Kernel, PointwiseKernel
from .kernels import Cosine, Exponential, Gaussian
from .normalizations.base import Identity, Normalization
from .normalizations.batch import Batch

__all__ = ["check_final", "check_head_axes", "check_scalars"]

#: Lowering recognises these classes, and would not call a method that a subclass overrides.
_FINAL = (Exponential, Gaussian, Cosine, Batch, Identity)


def check_final(name: str, part: Any) -> None:
    """Raise for a subclass of a class whose formula is fixed."""
    for cls in _FINAL:
        if isinstance(part, cls) and type(part) is not cls:
            base = "Normalization" if name == "normalization" else "PointwiseKernel or FeatureMap"
            raise TypeError(
                f"{name}: {type(part).__name__} is a subclass of {cls.__name__}, whose "
                f"formula is fixed; subclass {base} instead"
            )


def check_head_axes(*parts: Kernel | Normalization) -> None:
    """Raise for a parameter of T or Phi by query heads, as queries share both with keys."""
    for part in parts:
        pairs = isinstance(part, PointwiseKernel)  # log kappa is of a query and a key
        for p in () if pairs else part.parameters():
            if p.by_query_head:
                raise UnsupportedError(
                    f"{part.word}: parameter {p.name!r} has shapes {p.shapes}, and queries share "
                    "T and Phi with their keys; expected the axis of the key heads, 'H', first"
                )


def check_scalars(part: Any) -> None:
    """Raise for arrays and other objects in fields, which could not be hashed or printed."""
    for f in fields(part):
        value = getattr(part, f.name)
        values = value if isinstance(value, tuple) else (value,)
        for v in values:
            if not (v is None or type(v) in (bool, int, float, str)):
                raise TypeError(
                    f"{type(part).__name__}.{f.name}: got {type(v).__name__}, expected a plain "
                    "number or name (arrays go in params)"
                )
