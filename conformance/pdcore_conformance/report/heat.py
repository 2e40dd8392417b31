"""Steps of the colour scale of errors over their budgets."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable

__all__ = ["LEGEND", "largest", "step"]

#: Upper ends of all steps but the last, a half or a whole decade apart; above 1 a case fails.
ENDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)

#: The meaning of each step.
LEGEND = (*(f"≤ {end:g}" for end in ENDS), f"> {ENDS[-1]:g}")


def step(ratio: float) -> int:
    """Return the step of an error over budget, from 0 to 8; from 5 on it is over.

    A NaN gets the last step.
    """
    return len(ENDS) if math.isnan(ratio) else bisect_left(ENDS, ratio)


def largest(ratios: Iterable[float | None]) -> float | None:
    """Return the largest ratio that is not None, where NaN counts as infinite; None without any."""
    numbers = [math.inf if math.isnan(r) else r for r in ratios if r is not None]
    return max(numbers, default=None)
