"""Steps of the colour scale of errors over their budgets."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable

__all__ = ["LEGEND", "largest", "step"]

#: Upper ends of all steps but the last, a half or a whole decade apart; 1 is where a case fails.
ENDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)

#: Every step with what it stands for.
LEGEND = (*(f"≤ {end:g}" for end in ENDS), f"> {ENDS[-1]:g}")


def step(ratio: float) -> int:
    """Give the step of an error over budget, from 0 to 8; from 5 on it is over.

    A NaN is over everything.
    """
    return len(ENDS) if math.isnan(ratio) else bisect_left(ENDS, ratio)


def largest(ratios: Iterable[float | None]) -> float | None:
    """Give the largest of the ratios that there are, NaN counting as infinite; None for none."""
    found = [math.inf if math.isnan(r) else r for r in ratios if r is not None]
    return max(found, default=None)
