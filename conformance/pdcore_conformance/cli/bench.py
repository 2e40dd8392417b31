"""``pdcore bench``: speed and memory of one backend whose numbers are right."""

from __future__ import annotations

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
    from ..record.writing import Run, Speed

__all__ = ["bench"]


@reported
def bench(
    backend: Annotated[
        str, typer.Argument(metavar="NAME[:DEVICE]", help="Such as torch:cuda.")
    ] = "numpy",
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="PEER", help="Only this peer; may be repeated. See --list-peers."),
    ] = None,
    grid: Annotated[
        str, typer.Option(help="quick: shorter sequences, no verdicts; or full.")
    ] = "quick",
    threads: Annotated[int, typer.Option(help="Threads on the CPU.", min=1)] = 2,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the record there, or add to it.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 8 where a target is not met.")
    ] = False,
    list_peers: Annotated[
        bool, typer.Option("--list-peers", help="List the peers, and why one cannot be had here.")
    ] = False,
    table: Annotated[
        bool,
        typer.Option("--table", help="Times over those of the usual attention, with their goals."),
    ] = False,
    spec: Annotated[
        str | None, typer.Option(help="Only this row of the table, such as bn.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="B,H,N,D", help="Only this column of the table.")
    ] = None,
    direction: Annotated[
        str | None, typer.Option(help="Only the result (forward), or with gradients (both).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure speed, growth and memory, interleaved with the peers that compute the same.

    Nothing is timed before the numbers are right, and a peer that is missing is named.
    What is measured when the command is ended by a signal is printed and kept.
    """
    if grid not in ("quick", "full"):
        raise typer.BadParameter(f"got {grid!r}, expected quick or full", param_hint="--grid")
    with extra_needed("pytest", "hypothesis", "autograd"):
        from ..bench import peers
        from ..bench import table as speed_table
        from ..judge import gradients, subject  # noqa: F401 - without autograd, say so at once
        from ..runner import plugin
    in_table = table or bool(spec or shape or direction)
    try:
        name, device = plugin.parse_backend(backend)
        peers.choose_peers(against or None)
        options = {"grid": grid, "peers": against or None}
        if in_table:
            if against or grid != "quick":
                raise ValueError("--table has peers and a grid of its own: no --against, no --grid")
            options = _table_options(name, spec, shape, direction)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if list_peers:
        _list_peers(device, as_json)
        return
    if report is not None and not report.parent.is_dir():
        raise OutputError(f"--report: there is no folder {report.parent}")
    run, others = _run_and_others(name, device, report)
    run |= _circumstances(name, device)
    try:
        measured = _measured(run, threads=threads, **options)
    finally:  # a signal leaves what is measured by then
        if run["speed"] is not None:
            if report is not None:
                _save(report, [*others, run])
            show = speed_table.show_rows if in_table else speed_table.show
            emit(run) if as_json else show(run, stdout())
    _check(measured, strict=strict)


def _measured(run: Run, **options: Any) -> Speed:
    """Measure the speed of a run; before each step, add to the run what is measured by then."""
    from ..bench import speed

    def keep(so_far: Speed) -> None:
        run["speed"] = so_far

    run["speed"] = None
    with progress(f"bench of {run['backend']}:{run['device']}") as show:
        run["speed"] = measured = speed.measure(
            run["backend"],
            run["device"],
            say=lambda title, share: show(share, title),
            keep=keep,
            **options,
        )
    return measured


def _table_options(
    backend: str, spec: str | None, shape: str | None, direction: str | None
) -> dict[str, Any]:
    """Return the options of `speed.measure` for a table, or for some of its rows."""
    from ..bench import rows
    from ..bench.workload import DIRECTIONS, parsed_shape

    ways = dict(zip(("forward", "both"), DIRECTIONS, strict=True))
    if direction is not None and direction not in ways:
        raise ValueError(f"--direction: got {direction!r}, expected {' or '.join(ways)}")
    column = None if shape is None else parsed_shape(shape)
    chosen = rows.choose(backend, spec, column, None if direction is None else ways[direction])
    return {
        "grid": "table",
        "peers": rows.peers_of([row for row, _ in chosen]),
        "listed": lambda bench: rows.steps(bench, chosen),
    }


def _circumstances(name: str, device: str) -> Any:
    """Return environment, versions and precision of a run; raise where there is no backend."""
    from ..judge.subject import Subject
    from ..record.environment import environment, versions

    tested = Subject(name, device)
    reason = tested.framework.available(device)
    if reason is not None:
        raise Failed(Exit.NO_BACKEND, f"{name}:{device} is not available: {reason}")
    return {
        "environment": environment(device),
        "versions": versions() | tested.backend.versions(),
        "precision": tested.framework.policy(),
    }


def _run_and_others(name: str, device: str, report: Path | None) -> tuple[Run, list[Run]]:
    """Return the run of this backend and device, new where the record has none, and the others."""
    from ..record import writing as record

    runs: list[Run] = []
    if report is not None and report.exists():
        runs = record.load(report)["runs"]
    ours = [run for run in runs if (run["backend"], run["device"]) == (name, device)]
    others = [run for run in runs if (run["backend"], run["device"]) != (name, device)]
    return ours[0] if ours else record.new_run(name, device), others


def _save(report: Path, runs: list[Run]) -> None:
    from ..record.writing import save

    save(report, runs, replace=True)
    note(f"record: {report}")


def _check(measured: Any, *, strict: bool) -> None:
    """End the command with an exit code where numerics are red or, if strict, a target unmet."""
    if measured["red"]:
        raise Failed(Exit.NUMERICS, "the numerics are red, so nothing is said about speed")
    unmet = [
        str(entry.get("name") or entry.get("peer") or entry.get("spec"))
        for group in ("ratios", "growth", "memory", "figures")
        for entry in measured[group]
        if entry["met"] is False
    ]
    if strict and unmet:
        raise Failed(Exit.UNMET, f"not met: {', '.join(unmet)}")


def _list_peers(device: str, as_json: bool) -> None:
    from ..bench.peers import PEERS

    rows: list[dict[str, Any]] = [
        {
            "peer": peer.name,
            "computes": list(peer.computes or ()),
            "backward": peer.backward,
            "missing": peer.missing(device),
        }
        for peer in PEERS.values()
    ]
    if as_json:
        emit({"peers": rows})
        return
    table = Table("peer", "computes", "backward", f"on {device}")
    for row in rows:
        table.add_row(
            escape(row["peer"]),
            escape(", ".join(row["computes"])),
            "yes" if row["backward"] else "",
            escape(row["missing"] or "available"),
        )
    stdout().print(table)
