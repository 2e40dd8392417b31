"""The lowering of a spec to a `Plan`, by exact rewrites."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..moved import attribute as _attribute
from .fold import BatchRows, ConstantFeature, Fold, Recentre, Unread
from .plan import Features, Group, Plan, Scores, Summary, Transform
from .rewrites import Signature, lower, restored
from .scaled_rows import ScaledRows, largest_entry, largest_key, scaled
from .transforms import (
    FeatureRows,
    GaussianRows,
    KeyShift,
    Normalize,
    Pullback,
    Rows,
    UnitRows,
    add_into,
    central,
    first_real,
    sum_to,
)

__all__ = [
    "BatchRows",
    "ConstantFeature",
    "FeatureRows",
    "Features",
    "Fold",
    "GaussianRows",
    "KeyShift",
    "Group",
    "Normalize",
    "Plan",
    "Pullback",
    "Recentre",
    "Rows",
    "ScaledRows",
    "Scores",
    "Signature",
    "Summary",
    "Transform",
    "UnitRows",
    "Unread",
    "add_into",
    "central",
    "first_real",
    "largest_entry",
    "largest_key",
    "lower",
    "restored",
    "scaled",
    "sum_to",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return _attribute(__name__, name)  # a name of 0.1
