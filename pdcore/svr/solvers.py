"""Solvers of the dual, and the scaling of problems and solutions around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import nearest
from .active_set import Array, Dual, DualSolution, polish

__all__ = ["SOLVERS", "check_solver", "solve", "solve_all"]

#: The largest numbers of Newton steps, and of steps on pairs of multipliers.
CLARABEL_STEPS, LIBSVM_STEPS = 200, 10_000_000


def solve(gram: Array, targets: Array, C: float, epsilon: float, solver: str) -> DualSolution:
    """Solve the dual of one output.

    The problem is scaled to a Gram matrix of mean diagonal 1 and targets from -1 to 1, and the
    solution of the solver is refined to float64 precision.

    Parameters
    ----------
    gram : array (W, W)
        K, positive semidefinite.
    targets : array (W,)
    C, epsilon : float
        The bound of the multipliers, and the half width of the tube.
    solver : {"clarabel", "sklearn"}

    Raises
    ------
    RuntimeError
        When the solver returns no multipliers.
    """
    unit = float(np.mean(np.diag(gram))) or 1.0
    low, high = float(np.min(targets)), float(np.max(targets))
    centre, width = 0.5 * (low + high), 0.5 * (high - low)
    if width <= epsilon:  # the tube contains all targets
        return DualSolution(np.zeros(len(targets)), centre, 0.0)
    dual = Dual(gram / unit, (targets - centre) / width, C * unit / width, epsilon / width)
    with warnings.catch_warnings():
        # Solvers warn when they stop early; the residual shows whether that matters.
        warnings.simplefilter("ignore")
        start = SOLVERS[solver](dual)
    solution = polish(dual, start)
    beta = solution.coefficients
    # Exactly C at the bound, where C * unit / width * width / unit may differ in the last digit.
    box = np.sign(beta) * C
    scaled = np.where(np.abs(beta) == dual.C, box, np.clip(beta * (width / unit), -C, C))
    return DualSolution(scaled, centre + width * solution.intercept, width * solution.residual)


def solve_all(
    tasks: Sequence[tuple[Array, Array]], C: float, epsilon: float, solver: str, jobs: int
) -> Iterator[DualSolution]:
    """Solve the dual of several outputs, (gram, targets) each, in `jobs` processes."""
    if jobs == 1:
        for gram, targets in tasks:
            yield solve(gram, targets, C, epsilon, solver)
        return
    joblib = _imported("joblib")
    run = joblib.Parallel(n_jobs=jobs, return_as="generator")
    yield from run(joblib.delayed(solve)(gram, y, C, epsilon, solver) for gram, y in tasks)


def check_solver(solver: str) -> None:
    """Raise for a solver that is unknown or not installed."""
    if solver not in SOLVERS:
        raise ValueError(f"solver: got {solver!r}; {nearest(str(solver), SOLVERS)}")
    for name in _NEEDS[solver]:
        _imported(name)


def _clarabel(dual: Dual) -> Array:
    """Solve by an interior point method, in (beta, t) with |beta| <= t."""
    sparse = _imported("scipy.sparse")
    qpsolvers = _imported("qpsolvers")
    count = len(dual.targets)
    one, zero = sparse.identity(count, format="csc"), sparse.csc_matrix((count, count))
    problem = qpsolvers.Problem(
        P=sparse.block_diag([sparse.csc_matrix(dual.gram), zero], format="csc"),
        q=np.append(-dual.targets, np.full(count, dual.epsilon)),
        G=sparse.bmat([[one, -one], [-one, -one]], format="csc"),
        h=np.zeros(2 * count),
        A=sparse.csc_matrix(np.append(np.ones(count), np.zeros(count))[None]),
        b=np.zeros(1),
        lb=np.append(np.full(count, -dual.C), np.zeros(count)),
        ub=np.full(2 * count, dual.C),
    )
    # Tighter than the results need: with looser tolerances `polish` may miss the active set.
    result = qpsolvers.solve_problem(
        problem,
        solver="clarabel",
        max_iter=CLARABEL_STEPS,
        direct_solve_method="faer",  # factorizes by blocks; the default takes three times as long
        tol_gap_abs=1e-12,
        tol_gap_rel=1e-12,
        tol_feas=1e-12,
    )
    if result.x is None or not np.all(np.isfinite(result.x)):
        raise RuntimeError(
            f"solver: clarabel ends with {result.extras.get('status')} and gives no multipliers; "
            "try solver='sklearn', a smaller C or a larger epsilon"
        )
    return np.asarray(result.x[:count], dtype=np.float64)


def _sklearn(dual: Dual) -> Array:
    """Solve by libsvm, whose Gram matrix is float32."""
    svm = _imported("sklearn.svm")
    model = svm.SVR(
        kernel="precomputed",
        C=dual.C,
        epsilon=dual.epsilon,
        tol=1e-6,
        cache_size=500.0,
        max_iter=LIBSVM_STEPS,
    ).fit(dual.gram, dual.targets)
    beta = np.zeros(len(dual.targets))
    beta[model.support_] = model.dual_coef_[0]
    return beta


SOLVERS: dict[str, Callable[[Dual], Array]] = {"clarabel": _clarabel, "sklearn": _sklearn}
_NEEDS = {"clarabel": ("scipy.sparse", "qpsolvers", "clarabel"), "sklearn": ("sklearn.svm",)}


def _imported(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        package = {"sklearn": "scikit-learn"}.get(package, package)
        raise ModuleNotFoundError(
            f"pdcore.svr: {package} is not installed: pip install 'pdcore[svr]'", name=error.name
        ) from error
