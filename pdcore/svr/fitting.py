"""`fit`: solve the regression behind an attention."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..backend import Inputs
from ..dispatch import validate
from ..spec import AttentionSpec, as_spec
from .active_set import DualSolution
from .certificate import missed
from .checks import check_float64, check_jobs, check_number, check_shapes
from .expansion import HeadFit, SupportVectorExpansion
from .head_kernel import check_regression, head_kernels, pool_rows
from .solvers import check_solver, solve_all

__all__ = ["fit"]

Array = np.ndarray[Any, Any]


def fit(
    keys: Array,
    targets: Array,
    spec: str | AttentionSpec = "softmax",
    *,
    C: float,
    epsilon: float,
    solver: str = "clarabel",
    params: Mapping[str, Array] | None = None,
    jobs: int = 1,
    progress: bool = False,
) -> SupportVectorExpansion:
    """Solve the regression behind an attention: find values that yield the targets at the keys.

    Each output of each head is one regression: minimise 1/2 |w|^2 + C sum max(0, |r| - epsilon)
    with r = y - f and f(x) = w.Phi(T(x)) / h(x) + b (Nguyen et al., 2023). A head with a scale is
    fitted to pooled keys and equally pooled targets.

    Parameters
    ----------
    keys : float64 array (H, M, D) or (M, D)
        The training inputs of each head, at least one.
    targets : float64 array (H, M, Dv) or (M, Dv)
        The targets y at the keys.
    spec : str or AttentionSpec
        The kernel, h, normalization and scales of the regression; one scale for each head.
    C : float
        The bound of the multipliers, > 0. K is of the order of 1 / (h h), so for ``h(sum)`` useful
        values of C grow with M squared.
    epsilon : float
        The size of errors that cost nothing, >= 0, in units of the targets.
    solver : {"clarabel", "sklearn"}
        clarabel by qpsolvers, or libsvm by scikit-learn. The solution of either is then refined
        to float64 precision.
    params : mapping of str to float64 array, optional
        The arrays that the spec declares.
    jobs : int
        The number of processes that solve outputs in parallel; -1 for one per core.
    progress : bool
        Show a progress bar on stderr, which needs rich, of the extra ``cli``.

    Returns
    -------
    SupportVectorExpansion

    Raises
    ------
    TypeError, ValueError
        For a wrong argument.
    UnsupportedError
        For a spec that is not one regression per head, or whose kernel is not positive
        semidefinite.
    ModuleNotFoundError
        Where the extra ``svr`` is not installed.
    RuntimeError
        When the solver returns no multipliers.

    Warns
    -----
    RuntimeWarning
        When the relative duality gap of an output exceeds 1e-8, or another residual 1e-6: when
        `certificate` with its default tolerances is not ok.
    """
    spec = as_spec(spec)
    check_regression(spec)
    # Copies, so that later writes by the caller do not change the expansion.
    keys, targets = check_float64("keys", keys).copy(), check_float64("targets", targets).copy()
    check_shapes(keys, targets)
    for name, number, zero in (("C", C, False), ("epsilon", epsilon, True)):
        check_number(name, number, zero=zero)
    check_jobs(jobs)
    x, y = (a if a.ndim == 3 else a[None] for a in (keys, targets))
    spec = validate(spec, Inputs(x, x, y, params={} if params is None else params), "numpy")
    check_solver(solver)
    params_copy = {name: p.copy() for name, p in (params or {}).items()}
    kernels = head_kernels(spec, x, params_copy)
    pooled = [pool_rows(part, spec, head) for head, part in enumerate(y)]
    tasks = [
        (kernel.gram, part[:, d])
        for kernel, part in zip(kernels, pooled, strict=True)
        for d in range(part.shape[1])
    ]
    solutions = solve_all(tasks, C, epsilon, solver, jobs)
    solved = list(_with_progress(solutions, len(tasks), solver) if progress else solutions)
    heads = []
    for head, (kernel, part) in enumerate(zip(kernels, pooled, strict=True)):
        outputs = solved[head * part.shape[1] : (head + 1) * part.shape[1]]
        beta = np.stack([s.coefficients for s in outputs], axis=1)
        b = np.array([s.intercept for s in outputs])
        heads.append(HeadFit(kernel, part, np.maximum(beta, 0.0), np.maximum(-beta, 0.0), b))
    _warn_of_missed(heads, C, epsilon, len(tasks))
    return SupportVectorExpansion(
        spec, keys, float(C), float(epsilon), solver, params_copy, tuple(heads)
    )


def _warn_of_missed(heads: Sequence[HeadFit], C: float, epsilon: float, count: int) -> None:
    """Warn of solutions that are not optimal."""
    found = missed(heads, C, epsilon)
    if found:
        warnings.warn(
            f"fit: {len(found)} of {count} solutions are not optimal ({found[0]}); see "
            "certificate(). Try the other solver, a smaller C, a larger epsilon, or targets whose "
            "mean is not far larger than their range",
            RuntimeWarning,
            stacklevel=3,
        )


def _with_progress(
    solutions: Iterable[DualSolution], count: int, solver: str
) -> Iterable[DualSolution]:
    """Yield the solutions, and show a progress bar on stderr."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"progress: {error.name} is not installed: pip install 'pdcore[cli]'", name=error.name
        ) from error
    title = f"{count} regressions by {solver}"
    return track(solutions, description=title, total=count, console=Console(stderr=True))
