"""Checks of the arguments of `pdcore.svr`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays import dtype_name, library_of

__all__ = ["check_jobs", "check_number", "check_float64", "check_shapes"]

Array = np.ndarray[Any, Any]


def check_float64(name: str, x: Any) -> Array:
    """Check that `x` is a NumPy array of finite float64, and return it."""
    library = library_of(x, name)
    if library != "numpy" or dtype_name(x) != "float64":
        raise TypeError(
            f"{name}: got a {library} array of {dtype_name(x)}, expected NumPy and "
            "float64; convert it yourself"
        )
    if not np.all(np.isfinite(x)):
        raise ValueError(f"{name}: got NaN or inf, expected finite numbers")
    return np.asarray(x)


def check_shapes(keys: Array, targets: Array) -> None:
    """Check the shapes of keys and targets."""
    if keys.ndim not in (2, 3) or 0 in keys.shape:
        raise ValueError(
            f"keys: got shape {keys.shape}, expected (H, M, D) or (M, D), none of them 0"
        )
    if targets.shape[:-1] != keys.shape[:-1] or not targets.shape[-1:] > (0,):
        like = ", ".join(map(str, keys.shape[:-1]))
        one = "; of one output, targets[..., None]" if targets.ndim == keys.ndim - 1 else ""
        raise ValueError(
            f"targets: got shape {targets.shape}, expected ({like}, Dv) like keys, "
            f"Dv at least 1{one}"
        )


def check_number(name: str, x: Any, *, zero: bool) -> None:
    """Check that `x` is a finite number > 0, or >= 0 with `zero`."""
    number = isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
    if not number or not math.isfinite(x) or not (x > 0 or (zero and x == 0)):
        bound = "from 0" if zero else "above 0"
        raise ValueError(f"{name}: got {x!r}, expected a finite number {bound}")


def check_jobs(jobs: Any, name: str = "jobs") -> None:
    """Check a number of processes: an int >= 1, or -1."""
    if type(jobs) is not int or (jobs < 1 and jobs != -1):
        raise ValueError(f"{name}: got {jobs!r}, expected a whole number from 1, or -1")
