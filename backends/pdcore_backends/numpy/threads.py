"""The worker threads: NumPy releases the interpreter lock inside its loops and BLAS calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

__all__ = ["buffer", "count", "run"]

VARIABLE = "PDCORE_NUM_THREADS"

_lock = threading.Lock()
_pools: dict[tuple[int, ...], ThreadPoolExecutor] = {}
_own = threading.local()


def count() -> int:
    """Give the number of threads: ``PDCORE_NUM_THREADS``, else the cores of this process."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return len(_cores())
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"{VARIABLE}: got {text!r}, expected a whole number >= 1")
    return int(text)


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def run(function: Callable[[Any], None], tasks: Iterable[Any], workers: int) -> None:
    """Call `function` on every task, by several threads; the first error is raised.

    A call from inside a worker runs its tasks itself, since waiting for its own pool could
    last for ever.
    """
    todo = iter(list(tasks))
    if workers <= 1 or getattr(_own, "works", False):
        for task in todo:
            function(task)
        return
    guard, stop = threading.Lock(), threading.Event()

    def work() -> None:
        # NumPy keeps its floating-point error state for each thread.
        with np.errstate(all="ignore"):
            while not stop.is_set():
                with guard:
                    task = next(todo, None)
                if task is None:
                    return
                function(task)

    jobs = []
    try:
        # An interrupt can come as early as the start of the first worker.
        pool = _pool(workers)
        for _ in range(workers):
            jobs.append(pool.submit(work))
        for job in jobs:
            job.result()
    finally:
        stop.set()  # after an error or an interrupt, nothing more is begun


def _pool(workers: int) -> ThreadPoolExecutor:
    """Give the pool, one worker on each core when all cores are used.

    OpenBLAS's threads keep spinning for a while after a product. Seeing every core busy, the
    scheduler would then wake two of our workers on one core, and they would share it.
    """
    cores = _cores()
    bound = workers == len(cores) and VARIABLE not in os.environ
    key = cores if bound else (-workers,)
    with _lock:
        pool = _pools.get(key)
        if pool is None:
            places = iter(cores if bound else ())
            pool = ThreadPoolExecutor(
                workers, thread_name_prefix="pdcore-numpy", initializer=_begin, initargs=(places,)
            )
            _pools[key] = pool
        return pool


def _begin(places: Any) -> None:
    _own.works = True
    with _lock:
        core = next(places, None)
    if core is not None and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, {core})
        except OSError:  # the set of cores has just changed; unbound is slower, not wrong
            return


def _after_fork() -> None:
    # A child has the pools of its parent, but none of their threads.
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def buffer(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """Give this thread's scratch array of that name, uninitialised.

    It is kept between tasks, since mapping and unmapping pages costs more than a block's sums.
    """
    size = int(np.prod(shape))
    kept = getattr(_own, name, None)
    if kept is None or kept.dtype != dtype or kept.size < size:
        kept = np.empty(size, dtype)
        setattr(_own, name, kept)
    return kept[:size].reshape(shape)
