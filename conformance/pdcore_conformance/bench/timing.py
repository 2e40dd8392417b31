"""Time several calls interleaved in one process, and summarize the times."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = [
    "LEAST",
    "Clock",
    "interleaved",
    "interval",
    "judged",
    "quartiles",
    "threads_limited",
    "wall_clock",
]

#: The rounds of a comparison that ends after some seconds, at least.
LEAST = 3
#: From a call and a number of repetitions to the seconds of one repetition.
Clock = Callable[[Callable[[], Any], int], float]


def wall_clock(call: Callable[[], Any], repeat: int) -> float:
    """Return the seconds of a call that returns when its result is computed."""
    started = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - started) / repeat


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm_up: int = 1,
    repeat: int | Mapping[str, int] = 1,
    clocks: Mapping[str, Clock] | None = None,
    seconds: float | None = None,
) -> dict[str, list[float]]:
    """Time calls in turn, so that other work of the machine slows all of them alike.

    Parameters
    ----------
    calls : mapping of str to callable
        The calls to time, by name.
    rounds : int
        Measurements of each call; the order is reversed every time.
    warm_up : int
        Rounds that come first and are not counted.
    repeat : int, or mapping of str to int
        Calls in one measurement, for calls that are too short for the clock; for all, or by name.
    clocks : mapping of str to callable, optional
        How to time each call, by name; `wall_clock` by default.
    seconds : float, optional
        The seconds after which no more rounds are started, once there are `LEAST`.

    Returns
    -------
    dict of str to list of float
        Seconds per call; entries with the same index were measured one after the other.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warm_up, rounds):
            order = list(calls.items())
            for name, call in order if turn % 2 else reversed(order):
                count = repeat if isinstance(repeat, int) else repeat[name]
                taken = (wall_clock if clocks is None else clocks[name])(call, count)
                if turn >= 0:
                    times[name].append(taken)
            spent = sum(map(sum, times.values()))
            if seconds is not None and turn + 1 >= LEAST and spent > seconds:
                break
    finally:
        if enabled:
            gc.enable()
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return [float(values[0])] * 3
    return [float(q) for q in statistics.quantiles(values, n=4, method="inclusive")]


def interval(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """Compute a bootstrap confidence interval of the median, by `scipy.stats.bootstrap`.

    Returns
    -------
    list of float or None
        The ends of the interval; None without SciPy, and for fewer than three values.
    """
    if len(values) < 3:
        return None
    try:
        from scipy.stats import bootstrap
    except ModuleNotFoundError:
        return None
    import numpy as np

    ends = bootstrap(
        (np.asarray(values),),
        np.median,
        confidence_level=level,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(ends.low), float(ends.high)]


@contextlib.contextmanager
def threads_limited(threads: int) -> Iterator[bool]:
    """Limit the threads of the BLAS and of the NumPy backend in a block.

    Yields
    ------
    bool
        Whether the BLAS is limited, which needs threadpoolctl.
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
    """Return a target, and whether a value meets it; ``met`` is None without a target."""
    low, high = target
    met = None
    if low is not None or high is not None:
        met = bool((low is None or value >= low) and (high is None or value <= high))
    return {"at_least": low, "at_most": high, "met": met}
