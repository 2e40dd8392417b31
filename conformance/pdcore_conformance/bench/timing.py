"""Time measured fairly: several calls interleaved in one process, medians, and what ran where."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["interleaved", "interval", "judged", "quartiles", "threads_limited"]


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1, repeat: int = 1
) -> dict[str, list[float]]:
    """Time calls in turn, so that whatever else the machine does meets all of them alike.

    Parameters
    ----------
    calls : mapping of str to callable
        What to time, by name.
    rounds : int
        Times for each of them; the order is turned round every time.
    warm_up : int
        Rounds before, not counted.
    repeat : int
        Calls in one measurement, for calls too short for the clock.

    Returns
    -------
    dict of str to list of float
        Seconds a call; entries of the same place were measured next to one another.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warm_up, rounds):
            order = list(calls.items())
            for name, call in order if turn % 2 else reversed(order):
                began = time.perf_counter()
                for _ in range(repeat):
                    call()
                if turn >= 0:
                    taken[name].append((time.perf_counter() - began) / repeat)
    finally:
        if collecting:
            gc.enable()
    return taken


def quartiles(values: Sequence[float]) -> list[float]:
    """Give the lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return [float(values[0])] * 3
    return [float(q) for q in statistics.quantiles(values, n=4, method="inclusive")]


def interval(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """Give a bootstrap interval of the median, by `scipy.stats.bootstrap`.

    Returns
    -------
    list of float or None
        Its ends; None without SciPy, and for fewer than three values.
    """
    if len(values) < 3:
        return None
    try:
        from scipy.stats import bootstrap
    except ModuleNotFoundError:
        return None
    import numpy as np

    found = bootstrap(
        (np.asarray(values),),
        np.median,
        confidence_level=level,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(found.low), float(found.high)]


@contextlib.contextmanager
def threads_limited(threads: int) -> Iterator[bool]:
    """Run a block with so many threads in the BLAS, and in the NumPy backend.

    Yields
    ------
    bool
        Whether the BLAS could be limited; it takes threadpoolctl.
    """
    variable = "PDCORE_NUM_THREADS"
    before = os.environ.get(variable)
    os.environ[variable] = str(threads)
    try:
        try:
            from threadpoolctl import threadpool_limits
        except ModuleNotFoundError:
            yield False
        else:
            with threadpool_limits(threads):
                yield True
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before


def judged(value: float, target: tuple[float | None, float | None]) -> dict[str, Any]:
    """Set a value beside its target; ``met`` is None where nothing is promised."""
    low, high = target
    met = None
    if low is not None or high is not None:
        met = bool((low is None or value >= low) and (high is None or value <= high))
    return {"at_least": low, "at_most": high, "met": met}
