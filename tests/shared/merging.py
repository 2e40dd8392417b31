"""Merges of states, and of the results of contractions, for the tests of the plan contract."""

from __future__ import annotations

from typing import Any

import numpy as np
from reference_cases import INF, Array

from pdcore.spec import Statistics


def merged(statistics: Statistics, states: list[Any], xp: Any = np) -> Any:
    total = states[0]
    for state in states[1:]:
        total = statistics.merge(total, state, xp=xp)
    return total


def merge(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Merge (out, L) of disjoint key blocks."""
    with np.errstate(invalid="ignore"):
        level = np.logaddexp.reduce([part[1] for part in parts], axis=0)
    out = np.zeros_like(parts[0][0])
    for value, lse in parts:
        share = np.where(lse > -INF, np.exp(lse - np.where(level > -INF, level, 0.0)), 0.0)
        out = out + share[..., None] * value
    return out, level
