"""Finish a solution of the dual in float64: the active set of a near-optimal one, made exact.

The dual of one output, with beta = a - a*:

    minimise 1/2 beta.K beta - y.beta + eps |beta|_1   subject to   |beta| <= C,  sum beta = 0

A solver's multipliers are near 0, near the box or inside it. The set of those inside gives a
linear system (the semismooth Newton step of the optimality condition beta = P(beta - s grad)),
whose solution gives the next set, until nothing changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Dual", "Solved", "polish"]

Array = np.ndarray[Any, Any]

STEPS = 200
#: Rejected steps in a row, each with ten times the damping of the one before.
REJECTED = 10


class Dual(NamedTuple):
    """The dual of one output: K (W, W), y (W,), C and epsilon."""

    gram: Array
    targets: Array
    C: float
    epsilon: float


class Solved(NamedTuple):
    """beta (W,), b, and the residual |beta - P(beta - s grad)| / s."""

    coefficients: Array
    intercept: float
    residual: float


def polish(dual: Dual, start: Array) -> Solved:
    """Improve a near-optimal beta (W,) until rounding is all that is left.

    The result lies in the box, and its entries at 0 and at C are so exactly. From a start that is
    far from optimal it may end anywhere: the residual says so.
    """
    step = 1.0 / max(float(np.max(np.diag(dual.gram))), np.finfo(np.float64).tiny)
    candidate, damping = start, np.inf
    best, point = np.inf, _Point(dual, start, step)
    rejected = 0
    for _ in range(STEPS):
        found = _Point(dual, candidate, step)
        if found.residual < best:
            best, point, rejected = found.residual, found, 0
            damping = min(damping, 1e-2 * best)
        else:
            damping, rejected = 10.0 * damping, rejected + 1
            if rejected > REJECTED or best <= 1e-14 * np.max(np.abs(dual.targets), initial=0.0):
                break
        candidate = point.newton(max(damping, 1e-13 / step))
    beta = point.projected
    return Solved(beta, _intercept(dual, beta, point.offset), point.residual)


class _Point:
    """A beta, its projected gradient step, and the active set that the step has."""

    def __init__(self, dual: Dual, beta: Array, step: float) -> None:
        self.dual, self.beta = dual, beta
        self.threshold = step * dual.epsilon
        forward = beta - step * (dual.gram @ beta - dual.targets)
        shift = _balancing(forward, self.threshold, dual.C)
        self.offset = shift / step
        self.forward = forward - shift
        self.projected = _shrunk(self.forward, self.threshold, dual.C)
        self.residual = float(np.max(np.abs(beta - self.projected), initial=0.0)) / step

    def newton(self, damping: float) -> Array:
        """Solve for the multipliers inside the box, the others held."""
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
        known = targets[free] - epsilon * sign[free] - gram[free] @ new + damping * self.beta[free]
        new[free] = np.linalg.solve(system, np.append(known, -np.sum(new)))[:-1]
        return new


def _shrunk(x: Array, threshold: float, C: float) -> Array:
    return np.asarray(np.clip(np.sign(x) * np.maximum(np.abs(x) - threshold, 0.0), -C, C))


def _balancing(x: Array, threshold: float, C: float) -> float:
    """Find the shift at which the shrunk entries sum to 0; the sum falls, in straight pieces."""
    ends = np.sort(
        np.concatenate([x - threshold - C, x - threshold, x + threshold, x + threshold + C])
    )
    low, high = 0, len(ends) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if np.sum(_shrunk(x - ends[middle], threshold, C)) > 0:
            low = middle
        else:
            high = middle
    above, below = (float(np.sum(_shrunk(x - ends[i], threshold, C))) for i in (low, high))
    if above == below:
        return float(0.5 * (ends[low] + ends[high]))
    return float(ends[low] + (ends[high] - ends[low]) * above / (above - below))


def _intercept(dual: Dual, beta: Array, offset: float) -> float:
    """Give b: what a multiplier inside the box says, else the middle of what is allowed."""
    size = np.abs(beta)
    if np.any((size > 0) & (size < dual.C)):
        return offset
    error = dual.targets - dual.gram @ beta
    low = np.where(beta > 0, -np.inf, error - dual.epsilon)
    low = np.where(beta < 0, error + dual.epsilon, low)
    high = np.where(beta < 0, np.inf, error + dual.epsilon)
    high = np.where(beta > 0, error - dual.epsilon, high)
    return float(0.5 * (np.max(low) + np.min(high)))
