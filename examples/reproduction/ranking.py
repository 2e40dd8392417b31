"""Comparing classifiers over data sets: ranks, their tests, and a bootstrap of sets and seeds.

As J. Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .verdict import Estimate

__all__ = ["critical_difference", "detectable", "friedman", "hierarchical", "holm", "mean_ranks"]

Array = np.ndarray[Any, Any]

RESAMPLES = 20_000


def mean_ranks(accuracies: Array) -> Array:
    """Return the mean rank of each attention, 1 the best; ties share their ranks.

    Parameters
    ----------
    accuracies : array (data sets, attentions)
    """
    from scipy.stats import rankdata

    ranks: Array = rankdata(-accuracies, axis=1).mean(axis=0)
    return ranks


def friedman(accuracies: Array) -> float:
    """Return the p-value of Friedman's test that all attentions are equal; 1 where all tie.

    In Iman and Davenport's form, by F with k - 1 and (k - 1)(N - 1) degrees of freedom.
    """
    from scipy.stats import f, friedmanchisquare

    sets, attentions = accuracies.shape
    if (np.ptp(accuracies, axis=1) == 0).all():
        return 1.0
    chi = float(friedmanchisquare(*accuracies.T).statistic)
    most = sets * (attentions - 1)
    if chi >= most:
        return 0.0
    value = (sets - 1) * chi / (most - chi)
    return float(f.sf(value, attentions - 1, (attentions - 1) * (sets - 1)))


def critical_difference(attentions: int, sets: int, alpha: float = 0.05) -> float:
    """Return by how much mean ranks must differ to be told apart (Nemenyi's test)."""
    from scipy.stats import studentized_range

    q = float(studentized_range.isf(alpha, attentions, np.inf)) / math.sqrt(2.0)
    return q * math.sqrt(attentions * (attentions + 1) / (6.0 * sets))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method."""
    adjusted, highest = [0.0] * len(p), 0.0
    for place, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - place) * p[index]))
        adjusted[index] = highest
    return adjusted


def hierarchical(groups: Sequence[Sequence[float]], level: float) -> Estimate:
    """Estimate the mean over data sets, by a bootstrap of data sets and of the seeds in each.

    Parameters
    ----------
    groups : sequence of sequence of float
        The values by seed, for each data set; as many seeds everywhere.
    level : float
        The level of the percentile interval, such as 0.95.
    """
    values = np.asarray(groups, dtype=np.float64)
    sets, seeds = values.shape
    generator = np.random.default_rng(0)
    chosen = generator.integers(sets, size=(RESAMPLES, sets, 1))
    means = values[chosen, generator.integers(seeds, size=(RESAMPLES, sets, seeds))].mean((1, 2))
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def detectable(groups: Sequence[Sequence[float]], level: float, power: float = 0.8) -> float:
    """Return the smallest mean difference that would be shown with this power, by Student's t.

    The spread is that of the data sets' mean differences; infinite for a single data set.
    """
    from scipy.stats import t

    means = np.mean(np.asarray(groups, dtype=np.float64), axis=1)
    if len(means) < 2:
        return math.inf
    freedom = len(means) - 1
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    return float(t.ppf(0.5 + level / 2, freedom) + t.ppf(power, freedom)) * error
