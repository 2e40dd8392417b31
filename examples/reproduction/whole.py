"""A whole reproduction: the missing cells, the findings, and the files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdcore.cli.files import OutputError, replacing

from .findings import findings
from .page import GENERATOR, page
from .pictures import pictures
from .protocol import Cell, Grid, cells, of_same_cost, protocol, tuned, tunings, with_beta
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
    """Create the folder, or open the results in it where their settings are the same.

    Raises
    ------
    OutputError
        When the folder cannot be created, or takes no files.
    FileError
        When a file of that name is damaged, or is no file of results.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass  # or the first cell would be lost
    except OSError as error:
        raise OutputError(f"--out: {out}: cannot write there: {error.strerror}") from error
    path = out / f"{grid.name}.json"
    results = Results.open(path, setting(protocol(grid, specs)), force=force, say=say)
    results.take({name: _about(pair) for name, pair in series.items()}, say)
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
    """Compute the missing cells, and the findings.

    Parameters
    ----------
    results : Results
        The results, which keep every finished cell at once.
    grid, specs, series, jobs
        As in `reproduction.running.compute_all`.
    done : callable
        Called with each cell, its figures and the share of the cells that are done; at the start
        with None, None and that share.

    Returns
    -------
    dict
        The findings of `reproduction.findings.findings`.
    """
    names = list(series)
    tuning, rest = list(tunings(grid, specs, names)), list(cells(grid, specs, names))
    total = len(tuning) + len(rest)
    left = sum(cell.name not in results.cells for cell in [*tuning, *rest])
    done(None, None, 1.0 - left / total)

    def keep(cell: Cell, figures: dict[str, Any]) -> None:
        nonlocal left
        results.keep(cell, figures)
        left -= 1
        done(cell, figures, 1.0 - left / total)

    timed = list(dict.fromkeys(map(of_same_cost, specs)))
    for some in (tuning, rest):  # what is tuned has to be known before it is trained
        wanted = {
            cell: _spec(cell, results, grid) for cell in some if cell.name not in results.cells
        }
        compute_all(wanted, grid, timed, series, jobs, keep)
    conclusions = findings(results.record, list(series))
    results.conclude(conclusions)
    return conclusions


def _spec(cell: Cell, results: Results, grid: Grid) -> str:
    """Return the spec of a cell, with the beta that was tuned."""
    beta = tuned(results.cells, grid, cell.spec, cell.data)
    return cell.spec if beta is None else with_beta(cell.spec, beta)


def write(
    results: Results, conclusions: Mapping[str, Any], out: Path, *, force: bool
) -> list[Path]:
    """Write the plots and the page beside the results, and return the paths of all.

    Raises
    ------
    OutputError
        When the page exists, is of another program, and `force` is not set.
    """
    grid = results.record["protocol"]["name"]
    pngs = pictures(results.record, conclusions)
    written = [results.path]
    for name, png in pngs.items():
        written.append(out / f"{grid}-{name}.png")
        with replacing(written[-1], force=True) as stream:
            stream.write(png)
    written.append(out / f"{grid}.html")
    text = page(results.record, conclusions, pngs)
    with replacing(written[-1], force=force or _is_page(written[-1])) as stream:
        stream.write(text.encode("utf-8"))
    return written


def _is_page(path: Path) -> bool:
    """Return whether a file is a page of results."""
    try:
        with path.open("rb") as stream:
            return f'content="{GENERATOR}"'.encode() in stream.read(1024)
    except OSError:
        return False
