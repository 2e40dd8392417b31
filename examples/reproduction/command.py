"""``pdcore reproduce``: the claims of the paper, measured."""

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
from pdcore.cli.reporting import Failed, emit, note, progress, reported, stdout
from pdcore.errors import Exit, NoBackendError, SpecError, UnsupportedError
from pdcore.spec import parse

if TYPE_CHECKING:
    from .protocol import Grid
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
            help="A folder of the UEA archive with UWaveGestureLibrary or Handwriting, or with "
            "folders of them; may be repeated. What is not at hand is named and left out.",
        ),
    ] = None,
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            "-s",
            metavar="SPEC",
            help="Held against softmax; may be repeated. bn, sh(1,1,2,2) and bn+sh(1,1,2,2) by "
            "default.",
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")
    ] = False,
) -> None:
    """Measure accuracy, head redundancy and cost of Attention-BN and -SH, and judge the claims.

    The data are Japanese Vowels and the digits of scikit-learn, which need no path, and
    UWaveGestureLibrary and Handwriting by --data. The quick grid takes less than 20 minutes on two
    cores. Every finished cell is kept in --out, and a run that was interrupted goes on there.
    """
    try:
        for name in _NEEDED:
            import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        raise Failed(Exit.MISSING, f"{error.name} is not installed: {EXTRAS}") from error
    from . import protocol, whole
    from . import show as shown
    from .data import load

    grid = protocol.GRIDS["full" if full else "quick"]
    specs = _specs(protocol.BASELINE, spec or protocol.SPECS)
    try:
        series = load(data or [], grid)
    except FileError as error:
        raise FileError(f"--data: {error}") from error
    _try(specs, series, grid)
    for name, reason in _missing(series).items():
        note(f"{name}: {reason}")
    results = whole.open_results(out, grid, specs, series, force=force, say=note)
    with progress(f"reproduce, {grid.name} grid") as bar:

        def done(cell: Any, figures: Any, share: float) -> None:
            bar(share)
            if cell is None and share:
                note(f"{results.path}: {share:.0%} of the cells are there already")
            elif cell is not None:
                note(f"{share:4.0%} {cell.name}{_told(figures)}")

        try:
            with _kept(results):
                found = whole.run(results, grid, specs, series, jobs or _cores(), done)
        except FloatingPointError as error:
            raise Failed(Exit.NUMERICS, str(error)) from error
        except BrokenExecutor as error:
            raise Failed(
                Exit.FAILURE, "a process was ended from outside, or had too little memory"
            ) from error
    written = [str(path) for path in whole.write(results, found, out, force=force)]
    if as_json:
        emit(results.record | {"files": written})
        return
    shown.show(results.record, found, stdout())
    for path in written:
        stdout().print(f"wrote {escape(path)}", soft_wrap=True)


@contextlib.contextmanager
def _kept(results: Results) -> Iterator[None]:
    """Say of a run that ends early, by a signal too, what is left of it."""
    try:
        yield
    except BaseException:
        if results.cells:
            note(f"{results.path}: what is finished is kept; the same command goes on from there")
        raise


def _specs(baseline: str, texts: Sequence[str]) -> list[str]:
    """Give the canonical forms, the baseline first."""
    found = [baseline]
    for text in texts:
        try:
            own = str(parse(text))
        except SpecError as error:
            raise typer.BadParameter(str(error), param_hint="--spec") from error
        if own in found:
            raise typer.BadParameter(
                f"{own} is there twice"
                if own != baseline
                else f"{own} is what the others are held against, expected another",
                param_hint="--spec",
            )
        found.append(own)
    return found


def _try(specs: Sequence[str], series: Mapping[str, Pair], grid: Grid) -> None:
    """Take a step of each spec and throw it away: what cannot run says so before any work."""
    from .training.model import Settings
    from .training.run import try_step

    first = next(iter(series.values()))
    for spec in specs:
        try:
            try_step(Settings(spec=spec), first)
        except (UnsupportedError, NoBackendError) as error:
            raise UnsupportedError(f"--spec {spec}: {error}") from error
        except ValueError as error:
            raise typer.BadParameter(f"{spec}: {error}", param_hint="--spec") from error


def _missing(series: Mapping[str, Pair]) -> dict[str, str]:
    from .data import absent

    return absent(series)


def _told(figures: Mapping[str, Any]) -> str:
    """Say of a training how it went."""
    if "test_accuracy" not in figures:
        return ""
    return (
        f": epoch {figures['epoch']} of {figures['epochs']}, validation "
        f"{figures['validation_accuracy']:.1%}, test {figures['test_accuracy']:.1%}, "
        f"{figures['seconds']:.0f} s"
    )


def _cores() -> int:
    """Give the processes that run side by side where nobody said."""
    known = hasattr(os, "sched_getaffinity")
    return min(2, len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1)
