"""A record as one self-contained HTML page, and as a summary for a terminal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pdcore
from pdcore.cli.files import replacing

from ..record.writing import OUTCOMES, Record, Run, target
from . import measured, plots, view
from .heat import LEGEND, largest, step
from .templating import asset, render
from .view import Cell
from .wording import cut, over_budget, seconds, span

__all__ = ["page", "write_page"]

# A file with this text at its beginning is a page, which may be replaced.
_GENERATOR = "pdcore conformance report"

# Labels of the axis would touch at 400 px if they were nearer than this, in percent.
_APART = 14.0


def write_page(path: str | os.PathLike[str], record: Record, *, force: bool = False) -> None:
    """Write the page of a record; it appears whole, or not at all.

    Parameters
    ----------
    path : path
        Where to. A page of a record that is there is replaced.
    record : Record
        As `pdcore_conformance.record.load` returns it.
    force : bool
        Whether to replace also a file that is not a page.

    Raises
    ------
    OutputError
        When `path` is something else and `force` is not set, or cannot be written.
    ModuleNotFoundError
        Without jinja2.
    """
    path = Path(path)
    text = page(record)
    with replacing(path, force=force or _is_page(path)) as stream:
        stream.write(text.encode("utf-8"))


def _is_page(path: Path) -> bool:
    """Return whether a file is a page of a record, or empty."""
    try:
        with path.open("rb") as stream:
            return (start := stream.read(1024)) == b"" or _GENERATOR.encode() in start
    except OSError:
        return False


@dataclass(frozen=True)
class _Tick:
    at: float
    text: str
    one: bool


@dataclass(frozen=True)
class _Timed:
    figures: measured.Figures
    comparisons: list[plots.PeerPlot]


@dataclass(frozen=True)
class _Summary:
    name: str
    reason: str
    counts: tuple[Cell, ...]
    worst: Cell
    took: str
    asked: str


def page(record: Record) -> str:
    """Return a record as HTML that needs nothing else: no network, no script, no font.

    Parameters
    ----------
    record : Record
        As `pdcore_conformance.record.load` returns it. Its texts may be hostile: they are
        escaped everywhere, and control and direction characters are shown as escapes.

    Returns
    -------
    str

    Raises
    ------
    ModuleNotFoundError
        Without jinja2.
    """
    return render(
        "report",
        **_contents(record),
        # The page's security policy admits these two files, by their hashes, and nothing else.
        **asset("style", "style.css"),
        **asset("script", "behaviour.js"),
    )


def _contents(record: Record) -> dict[str, Any]:
    runs = record["runs"]
    axis = plots.ratio_axis(record)
    failures = view.failures(record)
    cases = view.all_cases(record)
    left_out = sum(group.left_out for group in cases)
    return {
        "title": _title(runs),
        "about": _about(runs),
        "generator": _GENERATOR,
        "version": pdcore.__version__,
        "names": [target(run) for run in runs],
        "verdict": view.conclusion(record),
        "outcomes": OUTCOMES,
        "summary": [_summary(run) for run in runs],
        "failures": failures[: view.MOST_FAILURES],
        "failure_count": _counted(len(failures)),
        "most_message": view.MOST_MESSAGE,
        "known": view.with_message(record, "known failure")[: view.MOST_FAILURES],
        "matrix": view.matrix(record),
        "heat": view.heat_map(record),
        "legend": LEGEND,
        "timed": [
            _Timed(figures, plots.comparisons(run, axis))
            for run in runs
            if (figures := measured.figures(run)) is not None
        ],
        "ticks": [_Tick(axis.at(v), f"{v:g}×", v == 1) for v in axis.ticks(_APART)],
        "gate": measured.gate(record),
        "uneven": measured.uneven(record),
        "missing": measured.missing_by_reason(record),
        "charts": plots.charts(record),
        "frame": {
            "width": plots.WIDTH,
            "height": plots.HEIGHT,
            "left": plots.LEFT,
            "right": plots.RIGHT,
            "top": plots.TOP,
            "bottom": plots.BOTTOM,
        },
        "memory": measured.memory(record),
        "environment": view.environment(record),
        "cases": cases,
        "left_out": f"The {left_out:,} with the smallest errors are left out." if left_out else "",
    }


def _title(runs: list[Run]) -> str:
    if len(runs) == 1:
        return f"Conformance of {target(runs[0])}"
    return f"Conformance of {len(runs)} backends" if runs else "An empty conformance record"


def _about(runs: list[Run]) -> str:
    if not runs:
        return "This record holds no run."
    versions = span([run["versions"].get("pdcore", "unknown") for run in runs])
    when = span([run["created"].replace("T", " ").replace("Z", " UTC") for run in runs])
    commits = sorted({view.commit(run) for run in runs})
    machines = sorted({_machine(run) for run in runs})
    return (
        f"pdcore {versions}, commit {', '.join(commits)}; {when}; "
        f"on {cut('; '.join(machines), 400)}."
    )


def _machine(run: Run) -> str:
    where = run["environment"]
    gpu = f", {where['gpu']['name']}" if where["gpu"] else ""
    return f"{where['cpu']} ({where['cores']:,} cores{gpu})"


def _counted(many: int) -> str:
    if many > view.MOST_FAILURES:
        return f"The first {view.MOST_FAILURES:,} of {many:,}; the record has all."
    return f"{many:,} failed." if many > 1 else "One failed."


def _summary(run: Run) -> _Summary:
    kinds = {"failed": "bad", "error": "bad", "known failure": "warn", "passed": "good"}
    counts = tuple(
        Cell(f"{run['counts'][o]:,}", kinds.get(o, "") if run["counts"][o] else "none")
        for o in OUTCOMES
    )
    worst = largest(case["ratio"] for case in run["cases"])
    return _Summary(
        target(run),
        "" if run["available"] else run["reason"] or "no reason given",
        counts,
        Cell("") if worst is None else Cell(over_budget(worst), f"h{step(worst)}"),
        seconds(run["seconds"]),
        view.asked(run),
    )
