"""Refinement of an approximate solution of the dual to float64 precision, by its active set.

The dual of one output, with beta = a - a*:

    minimise 1/2 beta.K beta - y.beta + eps |beta|_1   subject to   |beta| <= C,  sum beta = 0

Each multiplier of a solver is near 0, near -C or C, or between. The multipliers between form the
active set. They solve a linear system, the semismooth Newton step of the optimality condition
beta = P(beta - s grad), whose solution determines the next active set, until the set is stable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Dual", "DualSolution", "polish"]

Array = np.ndarray[Any, Any]

STEPS = 200
#: The largest number of consecutive rejected steps, each with ten times the damping of the last.
REJECTED = 10


class Dual(NamedTuple):
    """The dual of one output: K (W, W), y (W,), C and epsilon."""

    gram: Array
    targets: Array
    C: float
    epsilon: float


class DualSolution(NamedTuple):
    """beta (W,), b, and the residual |beta - P(beta - s grad)| / s."""

    coefficients: Array
    intercept: float
    residual: float


def polish(dual: Dual, start: Array) -> DualSolution:
    """Improve a near-optimal beta (W,) to the precision of float64.

    All entries of the result are in the box, and entries at 0 and at C are there exactly. From a
    start that is far from optimal, the result may be far from optimal too, as its residual shows.
    """
    step = 1.0 / max(float(np.max(np.diag(dual.gram))), np.finfo(np.float64).tiny)
    candidate, damping = start, np.inf
    best, point = np.inf, _Point(dual, start, step)
    rejected = 0
    for _ in range(STEPS):
        trial = _Point(dual, candidate, step)
        if trial.residual < best:
            best, point, rejected = trial.residual, trial, 0
            damping = min(damping, 1e-2 * best)
        else:
            damping, rejected = 10.0 * damping, rejected + 1
            if rejected > REJECTED or best <= 1e-14 * np.max(np.abs(dual.targets), initial=0.0):
                break
        candidate = point.newton(max(damping, 1e-13 / step))
    beta = point.projected
    return DualSolution(beta, _intercept(dual, beta, point.offset), point.residual)


class _Point:
    """A beta, its projected gradient step, and the active set of that step."""

    def __init__(self, dual: Dual, beta: Array, step: float) -> None:
        self.dual, self.beta = dual, beta
        self.threshold = step * dual.epsilon
        forward = beta - step * (dual.gram @ beta - dual.targets)
        shift = _balancing_shift(forward, self.threshold, dual.C)
        self.offset = shift / step
        self.forward = forward - shift
        self.projected = _soft_threshold(self.forward, self.threshold, dual.C)
        self.residual = float(np.max(np.abs(beta - self.projected), initial=0.0)) / step

    def newton(self, damping: float) -> Array:
        """Solve for the multipliers between 0 and C in size, with the others fixed."""
        gram, targets, C, epsilon = self.dual
        size, sign = np.abs(self.forward), np.sign(self.forward)
        free = np.flatnonzero((size > self.threshold) & (size < self.threshold + C))
        new = np.where(size > self.threshold, sign * C, 0.0)
        if not len(free):
            return self.projected
        new[free] = 0.0
        system = np.ones((len(free) + 1, len(free) + 1))
        system[:-1, :-1] = gram[np.ix_(free, free)] + damping * np.eye(len(free))
        system[-1, -1] = 0.0
        right = targets[free] - epsilon * sign[free] - gram[free] @ new + damping * self.beta[free]
        new[free] = np.linalg.solve(system, np.append(right, -np.sum(new)))[:-1]
        return new


def _soft_threshold(x: Array, threshold: float, C: float) -> Array:
    """Shrink the entries towards 0 by `threshold`, and clip them to the box."""
    return np.asarray(np.clip(np.sign(x) * np.maximum(np.abs(x) - threshold, 0.0), -C, C))


def _balancing_shift(x: Array, threshold: float, C: float) -> float:
    """Find the shift at which the soft-thresholded entries sum to 0.

    The sum is a piecewise linear, decreasing function of the shift.
    """
    knots = np.sort(
        np.concatenate([x - threshold - C, x - threshold, x + threshold, x + threshold + C])
    )
    low, high = 0, len(knots) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if np.sum(_soft_threshold(x - knots[middle], threshold, C)) > 0:
            low = middle
        else:
            high = middle
    above, below = (float(np.sum(_soft_threshold(x - knots[i], threshold, C))) for i in (low, high))
    if above == below:
        return float(0.5 * (knots[low] + knots[high]))
    return float(knots[low] + (knots[high] - knots[low]) * above / (above - below))


def _intercept(dual: Dual, beta: Array, offset: float) -> float:
    """Return b: determined by multipliers inside the box, else the middle of its allowed range."""
    size = np.abs(beta)
    if np.any((size > 0) & (size < dual.C)):
        return offset
    error = dual.targets - dual.gram @ beta
    low = np.where(beta > 0, -np.inf, error - dual.epsilon)
    low = np.where(beta < 0, error + dual.epsilon, low)
    high = np.where(beta < 0, np.inf, error + dual.epsilon)
    high = np.where(beta > 0, error - dual.epsilon, high)
    return float(0.5 * (np.max(low) + np.min(high)))
