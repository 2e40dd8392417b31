"""The worker threads: NumPy releases the interpreter lock inside its loops and BLAS calls."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import numpy as np

from pdcore.extend import SettingError

__all__ = ["buffer", "count", "run"]

VARIABLE = "PDCORE_NUM_THREADS"
#: ``1`` binds each worker to a core of its own, if there is a worker for each.
PIN = "PDCORE_PIN_THREADS"
#: Variables that limit other libraries, and with them this backend; joblib sets them.
OTHERS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_lock = threading.Lock()
_queues: dict[tuple[int, ...], SimpleQueue[Any]] = {}
_local = threading.local()
_blas: list[Any] | None = None


def count(*, small: bool = False) -> int:
    """Return the number of threads of a call.

    ``PDCORE_NUM_THREADS`` decides. Without that variable, the number is the smallest of: the cores
    that this process may use, ``OMP_NUM_THREADS`` and the variables of the BLAS, and the threads
    that threadpoolctl leaves to NumPy's BLAS at this moment.

    Parameters
    ----------
    small : bool
        Whether the call is too small for more than one thread; the variable is checked even so.

    Raises
    ------
    SettingError
        When ``PDCORE_NUM_THREADS`` is no whole number from 1.
    """
    text = os.environ.get(VARIABLE)
    named = None if text is None else _whole(text)
    if text is not None and named is None:
        raise SettingError(f"{VARIABLE}: got {text!r}, expected a whole number >= 1")
    if small:
        return 1
    if named is not None:
        return named
    # OpenMP's variable may list numbers for nested loops. What is no number is not ours to report.
    others = [_whole(os.environ.get(name, "").partition(",")[0]) for name in OTHERS]
    return min([len(_cores()), *(n for n in others if n is not None), *_limits()])


def _whole(text: str) -> int | None:
    text = text.strip()
    whole = text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0
    return int(text) if whole else None


def _limits() -> list[int]:
    """Return the present numbers of threads of NumPy's BLAS, if threadpoolctl may have set them."""
    global _blas
    module = sys.modules.get("threadpoolctl")
    if module is None:
        return []
    if _blas is None:
        # Its own controllers, kept: the search for the libraries takes milliseconds. Not
        # `threadpoolctl.register`, which knows nothing of a limit that was set before it.
        found = module.ThreadpoolController().select(user_api="blas").lib_controllers
        _blas = [one for one in found if "numpy" in one.filepath] or list(found)
    return [one.num_threads for one in _blas]


def _pinned() -> bool:
    text = os.environ.get(PIN, "0").strip()
    if text not in ("0", "1"):
        raise SettingError(f"{PIN}: got {text!r}, expected 0 or 1")
    return text == "1"


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def run(function: Callable[[Any], None], tasks: Iterable[Any], workers: int) -> None:
    """Call `function` on every task from several threads, and raise the first error.

    A worker that calls this function runs the tasks itself: waiting for its own pool could
    deadlock.
    """
    todo = iter(list(tasks))
    if workers <= 1 or getattr(_local, "works", False):
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

    jobs = [Future[None]() for _ in range(workers)]
    try:
        # In the `try`, as an interrupt may come while the first worker starts.
        queue = _queue(workers)
        for job in jobs:
            queue.put((job, work))
        for job in jobs:
            job.result()
    finally:
        stop.set()  # after an error or an interrupt, no worker starts another task


def _queue(workers: int) -> SimpleQueue[Any]:
    """Return the queue of a set of workers, and start them.

    With ``PDCORE_PIN_THREADS=1`` and a worker for each core, each is bound to its core: OpenBLAS's
    threads keep spinning for a while after a product, and with every core busy the scheduler may
    wake two workers on the same core. Other processes on these cores would wait for both, so
    this is not the default.

    The workers are daemon threads rather than a `ThreadPoolExecutor`: an interrupt while the
    executor starts a thread leaves that thread unregistered, and the interpreter then waits for
    the thread for ever at exit.
    """
    cores = _cores()
    bound = _pinned() and workers == len(cores)
    key = cores if bound else (-workers,)
    with _lock:
        queue = _queues.get(key)
        if queue is None:
            queue = SimpleQueue()
            for place in cores if bound else (None,) * workers:
                threading.Thread(
                    target=_serve, args=(queue, place), name="pdcore-numpy", daemon=True
                ).start()
            _queues[key] = queue
        return queue


def _serve(queue: SimpleQueue[Any], core: int | None) -> None:
    _local.works = True
    if core is not None and hasattr(os, "sched_setaffinity"):
        # The process may have lost this core; an unbound worker is slower, not wrong.
        with suppress(OSError):
            os.sched_setaffinity(0, {core})
    while True:
        job, work = queue.get()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - `run` raises it in the caller's thread
            job.set_exception(error)
        else:
            job.set_result(None)
        del job, work  # a waiting worker must not keep the arrays of the last call alive


def _after_fork() -> None:
    # A forked process has its parent's queues, but none of the threads that serve them.
    global _lock
    _lock = threading.Lock()
    _queues.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def buffer(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return this thread's scratch array of a name, uninitialised.

    The array is kept between tasks, since mapping and unmapping its pages costs more than
    computing a block.
    """
    size = int(np.prod(shape))
    kept = getattr(_local, name, None)
    if kept is None or kept.dtype != dtype or kept.size < size:
        kept = np.empty(size, dtype)
        setattr(_local, name, kept)
    return kept[:size].reshape(shape)
