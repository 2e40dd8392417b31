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
_pool: ThreadPoolExecutor | None = None
_own = threading.local()


def count() -> int:
    """Give the number of threads: ``PDCORE_NUM_THREADS``, else the cores of this process."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return _cores()
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"{VARIABLE}: got {text!r}, expected a whole number >= 1")
    return int(text)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(function: Callable[[Any], None], tasks: Iterable[Any], workers: int) -> None:
    """Call `function` on every task, by several threads; the first error is raised.

    The calling thread works too, so that a call from inside a worker cannot wait for itself.
    """
    todo = iter(list(tasks))
    if workers <= 1:
        for task in todo:
            function(task)
        return
    guard = threading.Lock()

    def work() -> None:
        # NumPy keeps its floating-point error state for each thread.
        with np.errstate(all="ignore"):
            while True:
                with guard:
                    task = next(todo, None)
                if task is None:
                    return
                function(task)

    pool = _workers()
    helpers = [pool.submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        with guard:
            list(todo)  # after an error, nothing is left to begin
        for helper in helpers:
            helper.cancel()
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _workers() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, _cores()), thread_name_prefix="pdcore-numpy")
        return _pool


def _after_fork() -> None:
    # A child has the pool object of its parent, but none of its threads.
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


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
