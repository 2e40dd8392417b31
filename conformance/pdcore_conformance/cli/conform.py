"""``pdcore conform``: the conformance suite on one backend."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pdcore.cli.files import OutputError
from pdcore.cli.options import AsJson
from pdcore.cli.reporting import Failed, emit, note, progress, reported, stdout
from pdcore.errors import Exit

from .extra import extra_needed

if TYPE_CHECKING:
    from ..record.writing import Case, Run

__all__ = ["conform"]

#: How many failures are printed in full; the record has all of them.
SHOWN = 10


@reported
def conform(
    backend: Annotated[str, typer.Argument(metavar="NAME[:DEVICE]", help="Such as torch:cuda.")],
    level: Annotated[
        str, typer.Option(help="core: what every backend has to have; all: what it declares too.")
    ] = "all",
    grid: Annotated[
        str, typer.Option(help="quick, or full: more sizes, four times the combinations.")
    ] = "quick",
    case: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this case; may be repeated.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the record there, as JSON.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Succeed where it is not available here.")
    ] = False,
    limit: Annotated[
        float,
        typer.Option(min=0.1, metavar="SECONDS", help="A case that takes longer has failed."),
    ] = 300.0,
    only_list: Annotated[bool, typer.Option("--list", help="List the ids of the cases.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge a backend by the float64 oracle: every axis, every pair, refusals, gradients, threads.

    The suite runs in a process of its own, so a backend that ends or blocks the process fails.

    Exits with 0 when something ran and nothing failed, 5 when the backend is not available, 7
    when a case fails.
    """
    _among("--level", level, ("core", "all"))
    _among("--grid", grid, ("quick", "full"))
    with extra_needed("pytest", "hypothesis", "autograd"):
        from ..judge import gradients  # noqa: F401 - without autograd, say so at once
        from ..runner import conforming, watching
    if report is not None and not report.parent.is_dir():
        raise OutputError(f"--report: there is no folder {report.parent}")
    try:
        if only_list:
            ids = conforming.list_cases(backend, level=level, grid=grid)
            emit({"cases": ids}) if as_json else print("\n".join(ids))
            return
        with progress(f"conformance of {backend}") as bar:
            run, code = watching.conform_watched(
                backend,
                limit=limit,
                level=level,
                grid=grid,
                cases=case or (),
                report=report,
                allow_missing=allow_missing,
                say=bar,
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except RuntimeError as error:
        raise Failed(Exit.FAILURE, str(error)) from error
    assert run is not None
    if as_json:
        emit(run)
    else:
        show(run, report)
    if code:
        known = code in list(Exit)
        raise Failed(Exit(code) if known else Exit.FAILURE, _verdict(run, code))


def show(run: Run, report: Path | None) -> None:
    """Print the outcome of a run: counts, the worst ratio of each group, failures."""
    out = stdout()
    versions = ", ".join(f"{name} {text}" for name, text in run["versions"].items())
    out.print(escape(f"{_name(run)}: {versions}"), soft_wrap=True)
    if not run["available"]:
        out.print(escape(f"not available: {run['reason']}"), soft_wrap=True)
        return
    out.print(escape(run["precision"]), soft_wrap=True)
    out.print(_counts(run))
    if "coverage" in run:
        from ..report.view import combinations

        out.print(f"{combinations(run)} passed", soft_wrap=True)
    if "ended" in run:
        from ..report.view import end_of
        from ..report.wording import visible

        out.print(f"[bold red]the process ended[/] {escape(visible(end_of(run)))}", soft_wrap=True)
        for line in run["ended"]["log"].splitlines():
            out.print(escape(f"  {visible(line)}"), soft_wrap=True)
    _show_failures(run, report)
    if report is not None:
        note(f"record: {report}")


def _counts(run: Run) -> Table:
    """Return the table of outcomes, group by group."""
    groups: dict[str, list[Case]] = {}
    for case in run["cases"]:
        groups.setdefault(case["group"], []).append(case)
    outcomes = [name for name, count in run["counts"].items() if count]
    table = Table("group", *outcomes, "worst error / budget", "seconds")
    for name, cases in groups.items():
        counts = [sum(case["outcome"] == outcome for case in cases) for outcome in outcomes]
        ratios = [case["ratio"] for case in cases if case["ratio"] is not None]
        table.add_row(
            escape(name),
            *(str(count or "") for count in counts),
            f"{max(ratios):.3g}" if ratios else "",
            f"{sum(c['seconds'] for c in cases):.1f}",
        )
    total = [str(run["counts"][outcome]) for outcome in outcomes]
    table.add_section()
    table.add_row("all", *total, "", f"{run['seconds']:.1f}")
    return table


def _show_failures(run: Run, report: Path | None) -> None:
    out = stdout()
    failures = [case for case in run["cases"] if case["outcome"] in ("failed", "error")]
    for failed in failures[:SHOWN]:
        out.print(f"[bold red]{failed['outcome']}[/] {escape(failed['id'])}", soft_wrap=True)
        out.print(escape(f"  {failed['message']}"), soft_wrap=True)
        command = shlex.join(["pdcore", "conform", _name(run), "--case", failed["id"]])
        out.print(escape(f"  alone: {command}"), soft_wrap=True)
    if len(failures) > SHOWN:
        where = f"see {report}" if report else "--report FILE keeps them"
        out.print(escape(f"and {len(failures) - SHOWN} more failures: {where}"))


def _verdict(run: Run, code: int) -> str:
    if not run["available"]:
        return f"{_name(run)} is not available: {run['reason']} (--allow-missing permits it)"
    failures = run["counts"]["failed"] + run["counts"]["error"]
    if failures:
        return f"{_name(run)} does not conform: {failures} of {len(run['cases'])} cases failed"
    if not run["counts"]["passed"]:
        return f"{_name(run)}: nothing passed, so nothing is proven"
    return f"pytest ended with {code}"


def _name(run: Run) -> str:
    return f"{run['backend']}:{run['device']}"


def _among(option: str, word: str, known: Any) -> None:
    if word not in known:
        raise typer.BadParameter(f"got {word!r}, expected {' or '.join(known)}", param_hint=option)
