"""Cells, computed one after another or in processes side by side."""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from .protocol import Cell, Grid
from .training.series import Pair

__all__ = ["compute", "compute_all"]


def compute(cell: Cell, spec: str, grid: Grid, specs: Sequence[str], series: Any) -> dict[str, Any]:
    """Return one measurement, taken on one thread.

    Parameters
    ----------
    cell : Cell
    spec : str
        The cell's spec, with a number for beta.
    grid : Grid
    specs : sequence of str
        All attentions that are timed in turn.
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
        if cell.kind == "tune":
            return _chosen(cell, spec, grid, series)
        if cell.kind == "train":
            return _trained(cell, spec, grid, series)
        if cell.kind == "memory":
            return {"mib": cost.peak(spec, cell.length, cell.dim)}
        if cell.kind == "flops":
            return dict(cost.flops(spec, cell.length, cell.dim))
        return {"seconds": cost.times(specs, cell.length, cell.dim, grid.rounds)}
    finally:
        torch.set_num_threads(before)


def _run(cell: Cell, spec: str, grid: Grid, series: Pair) -> Any:
    from pdcore_adapters.time_series.model import Settings

    from .training.run import Run

    fitted = round((1.0 - Settings.validation) * len(series.train.labels))
    epochs = max(1, grid.steps // math.ceil(fitted / Settings.batch))
    settings = Settings(
        spec=spec,
        seed=cell.seed,
        epochs=min(grid.epochs, epochs),
        patience=grid.patience,
        rate=grid.rate,
        noise=grid.noise,
    )
    return Run(settings, series)


def _chosen(cell: Cell, spec: str, grid: Grid, series: Pair) -> dict[str, Any]:
    """Fit the part that is not held back, and return the smallest validation loss."""
    run = _run(cell, spec, grid, series)
    while run.phase == "choose":
        run.advance()
    best = run.history[run.chosen - 1]
    return {"loss": best["loss"], "accuracy": best["accuracy"], "seconds": run.seconds}


def _trained(cell: Cell, spec: str, grid: Grid, series: Pair) -> dict[str, Any]:
    """Train once, and measure the heads before and after."""
    from .heads import distances

    run = _run(cell, spec, grid, series)
    untrained = distances(run.averaged, series.test, grid.shown)
    result = run.finish()
    return {
        "spec": spec,
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
    wanted: Mapping[Cell, str],
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
    wanted : mapping of Cell to str
        The cells, each with its spec as `compute` takes it.
    grid, specs
        As in `compute`.
    series : mapping of str to Pair
        The series by data set.
    jobs : int
        The number of processes; with 1 this process computes all.
    keep : callable
        Called with each cell and its figures.
    """
    timed = {cell: spec for cell, spec in wanted.items() if cell.kind == "time"}
    rest = {cell: spec for cell, spec in wanted.items() if cell.kind != "time"}
    if jobs == 1:
        for cell, spec in [*rest.items(), *timed.items()]:
            keep(cell, compute(cell, spec, grid, specs, series.get(cell.data)))
        return
    for some, workers in ((rest, jobs), (timed, 1)):
        if some:
            _side_by_side(some, grid, specs, series, workers, keep)


def _side_by_side(
    wanted: Mapping[Cell, str],
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
            pool.submit(compute, cell, spec, grid, specs, series.get(cell.data)): cell
            for cell, spec in wanted.items()
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
