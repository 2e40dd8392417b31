"""Gradients of the reference by HIPS autograd: the oracle of the gradient cases.

autograd differentiates NumPy's own arrays, and so those of ``numpy.longdouble``, which no other
framework has, and in which the calls in float64 are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from autograd import make_vjp
from autograd.builtins import tuple as traced_tuple

from .autograd_namespace import Argument, astype

__all__ = ["constants", "gradients", "pullback"]

Array = np.ndarray[Any, Any]
Function = Callable[[Mapping[str, Any]], Sequence[Any]]


def gradients(
    function: Function, arrays: Mapping[str, Array], cotangents: Sequence[Array | None]
) -> tuple[list[Array], dict[str, Array]]:
    """Evaluate a function of arrays, and pull cotangents of its results back.

    Parameters
    ----------
    function : callable
        Takes a mapping of arrays and returns results that were computed from them.
    arrays : mapping of str to array
        What to differentiate by.
    cotangents : sequence of array or None
        One for each result, of its shape; None for zeros.

    Returns
    -------
    results : list of array
    gradients : dict of str to array
        In the shapes and dtypes of `arrays`; zeros where nothing depends on one.
    """
    results, pull = pullback(function, arrays)
    return list(results), pull(cotangents)


def pullback(
    function: Function, arrays: Mapping[str, Any]
) -> tuple[Sequence[Any], Callable[[Sequence[Any]], dict[str, Any]]]:
    """Evaluate a function of arrays, and return its results and its vector-Jacobian product.

    Parameters
    ----------
    function, arrays
        As in `gradients`.

    Returns
    -------
    results : sequence of array
    pull : callable
        Takes cotangents as in `gradients` and returns gradients by name. autograd can
        differentiate it in turn.
    """

    def traced(x: Any) -> Any:
        return traced_tuple(function({name: Argument(x[name]) for name in arrays}))

    with np.errstate(all="ignore"):
        vjp, results = make_vjp(traced)(dict(arrays))

    def pull(cotangents: Sequence[Any]) -> dict[str, Any]:
        filled = tuple(
            np.zeros(y.shape, y.dtype) if d is None else astype(d, y.dtype)
            for y, d in zip(results, cotangents, strict=True)
        )
        with np.errstate(all="ignore"):
            by_name = vjp(filled)
        return {name: astype(by_name[name], x.dtype) for name, x in arrays.items()}

    return results, pull


def constants(x: Any) -> Any:
    """Let an array take part in a differentiated call as a constant; leave anything else."""
    return Argument(x) if isinstance(x, np.ndarray) else x
