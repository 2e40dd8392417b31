"""Checks of the arguments of `pdcore.svr`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays import dtype_name, library_of

__all__ = ["check_jobs", "check_number", "check_shapes", "float64"]

Array = np.ndarray[Any, Any]


def float64(name: str, x: Any) -> Array:
    """Refuse what is no NumPy array of finite float64."""
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
    """Refuse keys and targets that do not fit each other."""
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
    """Refuse what is no finite number above 0, or from 0."""
    number = isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
    if not number or not math.isfinite(x) or not (x > 0 or (zero and x == 0)):
        bound = "from 0" if zero else "above 0"
        raise ValueError(f"{name}: got {x!r}, expected a finite number {bound}")


def check_jobs(jobs: Any, name: str = "jobs") -> None:
    """Refuse what is no number of processes."""
    if type(jobs) is not int or (jobs < 1 and jobs != -1):
        raise ValueError(f"{name}: got {jobs!r}, expected a whole number from 1, or -1")
