"""The verdicts on claims: intervals of figures, and the conclusions from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Estimate", "combined", "judge", "sentence", "together"]

#: The verdicts on a claim. "not shown": the interval contains both answers. "in part": only some
#: figures confirm the claim.
CONFIRMED, DENIED, NOT_SHOWN, IN_PART = "confirmed", "denied", "not shown", "in part"


class Estimate(NamedTuple):
    """A figure with its interval."""

    value: float
    low: float
    high: float


def combined(groups: Sequence[Sequence[float]], weights: Sequence[float], level: float) -> Estimate:
    """Estimate a weighted sum of the means of groups, each with its variance.

    By Student's t with the degrees of freedom of Welch and Satterthwaite.

    Parameters
    ----------
    groups : sequence of sequence of float
        Two or more independent values each.
    weights : sequence of float
        The weight of each group's mean.
    level : float
        The level of the interval, such as 0.95.

    Raises
    ------
    ValueError
        When there is no group, or one with a single value: its variance is unknown.
    """
    from scipy.stats import t

    if not groups or min(map(len, groups)) < 2:
        raise ValueError(
            f"groups: got {[len(g) for g in groups]} values, expected two or more in each"
        )
    pairs = list(zip(groups, weights, strict=True))
    value = sum(w * statistics.fmean(g) for g, w in pairs)
    parts = [(w * w * statistics.variance(g) / len(g), len(g) - 1) for g, w in pairs]
    variance = sum(part for part, _ in parts)
    # Values that are all the same leave nothing but rounding.
    if variance <= (1e-12 * max(abs(x) for g in groups for x in g)) ** 2:
        return Estimate(value, value, value)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(t.ppf(0.5 + level / 2, freedom)) * math.sqrt(variance)
    return Estimate(value, value - half, value + half)


def judge(estimate: Estimate, null: float, *, more: bool, exact: bool = False) -> str:
    """Return the verdict on the claim that a figure is above, or below, a value.

    Parameters
    ----------
    estimate : Estimate
    null : float
        The value of no difference.
    more : bool
        Whether the claim is that the figure is above `null`; else that it is below.
    exact : bool
        Whether the figure has no uncertainty, so that being equal denies the claim too.

    Returns
    -------
    {"confirmed", "denied", "not shown"}
    """
    above, below = estimate.low > null, estimate.high < null
    if above or below:
        return CONFIRMED if above == more else DENIED
    return DENIED if exact else NOT_SHOWN


def together(verdicts: Sequence[str]) -> str:
    """Return the verdict on a claim of several figures.

    Returns
    -------
    {"confirmed", "denied", "not shown", "in part"}
        ``confirmed`` where all are, ``in part`` where some are; else ``denied`` where any is.
    """
    if CONFIRMED in verdicts:
        return CONFIRMED if set(verdicts) == {CONFIRMED} else IN_PART
    if IN_PART in verdicts:
        return IN_PART
    return DENIED if DENIED in verdicts else NOT_SHOWN


def sentence(verdicts: Sequence[str]) -> str:
    """Return the verdict on claims that are joined by "and".

    Returns
    -------
    {"confirmed", "denied", "not shown"}
        ``denied`` where one of them is.
    """
    if DENIED in verdicts:
        return DENIED
    return CONFIRMED if set(verdicts) == {CONFIRMED} else NOT_SHOWN
