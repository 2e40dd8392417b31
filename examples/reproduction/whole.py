"""The whole of it: data, cells that are missing, findings, and the files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdcore.cli.files import OutputError, replacing

from .findings import findings
from .page import GENERATOR, page
from .pictures import pictures
from .protocol import Cell, Grid, cells, protocol
from .results import Results, setting
from .running import compute_all
from .training.series import Pair

__all__ = ["open_results", "run", "write"]


def open_results(
    out: Path,
    grid: Grid,
    specs: Sequence[str],
    series: Mapping[str, Pair],
    *,
    force: bool,
    say: Callable[[str], None],
) -> Results:
    """Make the folder, and go on from the results in it where they fit.

    Raises
    ------
    OutputError
        When the folder cannot be made, or takes no files.
    FileError
        When there is a file that is damaged, or no file of results.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # or the first cell would be lost
    except OSError as error:
        raise OutputError(f"--out: {out}: cannot write there: {error.strerror}") from error
    path = out / f"{grid.name}.json"
    results = Results.open(path, setting(protocol(grid, specs)), force=force, say=say)
    results.take({name: _about(own) for name, own in series.items()}, say)
    return results


def _about(series: Pair) -> dict[str, Any]:
    return {
        "digest": series.digest(),
        "source": series.source,
        "train": len(series.train.labels),
        "test": len(series.test.labels),
        "channels": series.train.frames.shape[2],
        "length": series.train.frames.shape[1],
        "classes": len(series.classes),
    }


def run(
    results: Results,
    grid: Grid,
    specs: Sequence[str],
    series: Mapping[str, Pair],
    jobs: int,
    done: Callable[[Cell | None, dict[str, Any] | None, float], None],
) -> dict[str, Any]:
    """Compute what is missing, and work out the findings.

    Parameters
    ----------
    results : Results
        Every finished cell is kept there at once.
    grid, specs, series, jobs
        As in `reproduction.running.compute_all`.
    done : callable
        Is told each cell, its figures and the share of the cells that are there; at the start
        None, None and that share.

    Returns
    -------
    dict
        As `reproduction.findings.findings` gives it.
    """
    every = list(cells(grid, specs, list(series)))
    wanted = [cell for cell in every if cell.name not in results.cells]
    left = len(wanted)
    done(None, None, 1.0 - left / len(every))

    def keep(cell: Cell, figures: dict[str, Any]) -> None:
        nonlocal left
        results.keep(cell, figures)
        left -= 1
        done(cell, figures, 1.0 - left / len(every))

    compute_all(wanted, grid, specs, series, jobs, keep)
    found = findings(results.record, list(series))
    results.conclude(found)
    return found


def write(results: Results, found: Mapping[str, Any], out: Path, *, force: bool) -> list[Path]:
    """Write the plots and the page beside the results, and give the names of all.

    Raises
    ------
    OutputError
        When a page that is there is not one of these, and `force` is not set.
    """
    grid = results.record["protocol"]["name"]
    pngs = pictures(results.record, found)
    written = [results.path]
    for name, png in pngs.items():
        written.append(out / f"{grid}-{name}.png")
        with replacing(written[-1], force=True) as stream:
            stream.write(png)
    written.append(out / f"{grid}.html")
    text = page(results.record, found, pngs)
    with replacing(written[-1], force=force or _is_page(written[-1])) as stream:
        stream.write(text.encode("utf-8"))
    return written


def _is_page(path: Path) -> bool:
    """Tell whether a file is such a page."""
    try:
        with path.open("rb") as stream:
            return f'content="{GENERATOR}"'.encode() in stream.read(1024)
    except OSError:
        return False
