"""`fit`: the regression behind an attention, solved."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..backend import Inputs
from ..dispatch import validate
from ..spec import AttentionSpec, as_spec
from .active_set import Solved
from .checks import check_jobs, check_number, check_shapes, float64
from .expansion import HeadFit, SupportVectorExpansion
from .head_kernel import head_kernels, pooling, refuse
from .solvers import check_solver, solve_all

__all__ = ["fit"]

Array = np.ndarray[Any, Any]

#: Over the spread of the targets: a solution that misses it is warned of.
RESIDUAL = 1e-6


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
    """Solve the regression behind an attention: values that give the targets at the keys.

    Every output of every head is a regression of its own, 1/2 |w|^2 plus C for what an error
    exceeds epsilon, with f(x) = w.Phi(T(x)) / h(x) + b (Nguyen et al., 2023). A head with a scale
    is fitted on pooled keys and equally pooled targets.

    Parameters
    ----------
    keys : float64 array (H, M, D) or (M, D)
        The training inputs of each head, at least one.
    targets : float64 array (H, M, Dv) or (M, Dv)
        What f shall be there.
    spec : str or AttentionSpec
        The kernel, h, the normalization, the scales; one scale for each head.
    C : float
        The most that a multiplier may be, above 0. K has the size of 1 / (h h), so for
        ``h(sum)`` useful numbers grow with M squared.
    epsilon : float
        Errors up to it cost nothing, from 0; in units of the targets.
    solver : {"clarabel", "sklearn"}
        clarabel by qpsolvers, or libsvm by scikit-learn. The active set of either is then made
        exact in float64.
    params : mapping of str to float64 array, optional
        The arrays that the spec declares.
    jobs : int
        Processes that solve outputs side by side; -1 for one on each core.
    progress : bool
        Show a bar on stderr, which needs rich, of the extra ``cli``.

    Returns
    -------
    SupportVectorExpansion

    Raises
    ------
    TypeError, ValueError
        For a wrong argument.
    UnsupportedError
        For a spec that is not one regression a head, or whose kernel is not positive
        semidefinite.
    ModuleNotFoundError
        Where the extra ``svr`` is not installed.
    RuntimeError
        When the solver gives no multipliers.

    Warns
    -----
    RuntimeWarning
        Where a solution is not optimal to 1e-6 of the targets' size; the certificate says more.
    """
    spec = as_spec(spec)
    refuse(spec)
    # Copies: nothing that the caller writes later changes the expansion.
    keys, targets = float64("keys", keys).copy(), float64("targets", targets).copy()
    check_shapes(keys, targets)
    for name, number, zero in (("C", C, False), ("epsilon", epsilon, True)):
        check_number(name, number, zero=zero)
    check_jobs(jobs)
    x, y = (a if a.ndim == 3 else a[None] for a in (keys, targets))
    validate(spec, Inputs(x, x, y, params={} if params is None else params), "numpy")
    check_solver(solver)
    given = {name: p.copy() for name, p in (params or {}).items()}
    kernels = head_kernels(spec, x, given)
    pooled = [pooling(part, spec, head) for head, part in enumerate(y)]
    tasks = [
        (kernel.gram, part[:, d])
        for kernel, part in zip(kernels, pooled, strict=True)
        for d in range(part.shape[1])
    ]
    solutions = solve_all(tasks, C, epsilon, solver, jobs)
    found = list(_shown(solutions, len(tasks), solver) if progress else solutions)
    _warn(tasks, found, y.shape[-1])
    heads = []
    for head, (kernel, part) in enumerate(zip(kernels, pooled, strict=True)):
        own = found[head * part.shape[1] : (head + 1) * part.shape[1]]
        beta = np.stack([s.coefficients for s in own], axis=1)
        b = np.array([s.intercept for s in own])
        heads.append(HeadFit(kernel, part, np.maximum(beta, 0.0), np.maximum(-beta, 0.0), b))
    return SupportVectorExpansion(spec, keys, float(C), float(epsilon), solver, given, tuple(heads))


def _warn(tasks: Sequence[tuple[Array, Array]], found: Sequence[Solved], outputs: int) -> None:
    """Warn of solutions that are not optimal."""
    missed = [
        f"head {index // outputs}, output {index % outputs}: {solved.residual:.1e}"
        for index, ((_, targets), solved) in enumerate(zip(tasks, found, strict=True))
        if not solved.residual <= RESIDUAL * (np.ptp(targets) or 1.0)
    ]
    if missed:
        warnings.warn(
            f"fit: {len(missed)} of {len(tasks)} solutions are not optimal, by their residual "
            f"({missed[0]}); see certificate(). Try the other solver, a smaller C or a larger "
            "epsilon",
            RuntimeWarning,
            stacklevel=3,
        )


def _shown(solutions: Iterable[Solved], count: int, solver: str) -> Iterable[Solved]:
    """Show a bar on stderr while the solutions come."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"progress: {error.name} is not installed: pip install 'pdcore[cli]'", name=error.name
        ) from error
    title = f"{count} regressions by {solver}"
    return track(solutions, description=title, total=count, console=Console(stderr=True))
