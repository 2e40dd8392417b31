"""Cells, computed one after another or in processes side by side."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from .protocol import Cell, Grid
from .training.series import Pair

__all__ = ["compute", "compute_all"]


def compute(cell: Cell, grid: Grid, specs: Sequence[str], series: Any) -> dict[str, Any]:
    """Return one measurement, taken on one thread.

    Parameters
    ----------
    cell : Cell
    grid : Grid
    specs : sequence of str
        All attentions that are compared.
    series : Pair or None
        The series of a training; None for other cells.

    Returns
    -------
    dict
        Numbers, and lists and mappings of numbers.

    Raises
    ------
    FloatingPointError
        When a validation loss is no longer finite.
    """
    import torch

    from . import cost

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if cell.kind == "train":
            return _trained(cell, grid, series)
        if cell.kind == "memory":
            return {"mib": cost.peak(cell.spec, cell.length, cell.dim)}
        if cell.kind == "flops":
            return dict(cost.flops(cell.spec, cell.length, cell.dim))
        return {"seconds": cost.times(specs, cell.length, cell.dim, grid.rounds)}
    finally:
        torch.set_num_threads(before)


def _trained(cell: Cell, grid: Grid, series: Pair) -> dict[str, Any]:
    """Train once, and measure the heads before and after."""
    from .heads import distances
    from .training.model import Settings
    from .training.run import Run

    settings = Settings(spec=cell.spec, seed=cell.seed, epochs=grid.epochs, patience=grid.patience)
    run = Run(settings, series)
    untrained = distances(run.averaged, series.test, grid.shown)
    result = run.finish()
    return {
        "epoch": result["epoch"],
        "epochs": result["epochs"],
        "validation_accuracy": result["validation_accuracy"],
        "validation_loss": result["history"][result["epoch"] - 1]["loss"],
        "test_accuracy": result["test_accuracy"],
        "test_correct": result["test_correct"],
        "seconds": result["seconds"],
        "untrained": untrained,
        "trained": distances(run.averaged, series.test, grid.shown),
    }


def compute_all(
    wanted: Sequence[Cell],
    grid: Grid,
    specs: Sequence[str],
    series: Mapping[str, Pair],
    jobs: int,
    keep: Callable[[Cell, dict[str, Any]], None],
) -> None:
    """Compute cells, and pass on each when it is done.

    Times are measured last, when no other process of the run is active.

    Parameters
    ----------
    wanted : sequence of Cell
    grid, specs
        As in `compute`.
    series : mapping of str to Pair
        The series by data set.
    jobs : int
        The number of processes; with 1 this process computes all.
    keep : callable
        Called with each cell and its figures.
    """
    timed = [cell for cell in wanted if cell.kind == "time"]
    rest = [cell for cell in wanted if cell.kind != "time"]
    if jobs == 1:
        for cell in [*rest, *timed]:
            keep(cell, compute(cell, grid, specs, series.get(cell.data)))
        return
    for some, workers in ((rest, jobs), (timed, 1)):
        if some:
            _side_by_side(some, grid, specs, series, workers, keep)


def _side_by_side(
    wanted: Sequence[Cell],
    grid: Grid,
    specs: Sequence[str],
    series: Mapping[str, Pair],
    workers: int,
    keep: Callable[[Cell, dict[str, Any]], None],
) -> None:
    # Spawned: a fork would inherit PyTorch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_signals)
    try:
        tasks = {
            pool.submit(compute, cell, grid, specs, series.get(cell.data)): cell for cell in wanted
        }
        for task in as_completed(tasks):
            keep(tasks[task], task.result())
    except BaseException:
        # A cell may take minutes, so its process is ended.
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_signals() -> None:
    """Ignore Ctrl-C, which the parent process handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
