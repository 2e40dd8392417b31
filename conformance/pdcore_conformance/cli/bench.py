"""``pdcore bench``: speed and memory of one backend, after its numbers are found right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pdcore.cli.files import OutputError
from pdcore.cli.reporting import Failed, emit, note, progress, reported, stdout
from pdcore.errors import Exit

if TYPE_CHECKING:
    from ..record.writing import Run

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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")
    ] = False,
) -> None:
    """Measure speed, growth and memory, interleaved with the peers that compute the same.

    Nothing is timed before the numbers are right, and a peer that is missing is named.
    """
    if grid not in ("quick", "full"):
        raise typer.BadParameter(f"got {grid!r}, expected quick or full", param_hint="--grid")
    try:
        from ..bench import peers, speed
        from ..bench import table as speed_table
        from ..judge import gradients, subject  # noqa: F401 - without autograd, say so at once
        from ..record import environment
        from ..record import writing as record
        from ..runner import plugin
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        if needed not in ("pdcore_conformance", "pytest", "hypothesis", "autograd"):
            raise
        raise Failed(
            Exit.MISSING, f"{needed} is not installed: pip install 'pdcore[conformance]'"
        ) from error
    try:
        name, device = plugin.parse_backend(backend)
        peers.choose_peers(against)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if list_peers:
        _list(peers, device, as_json)
        return
    if report is not None and not report.parent.is_dir():
        raise OutputError(f"--report: there is no folder {report.parent}")
    tested = subject.Subject(name, device)
    reason = tested.framework.available(device)
    if reason is not None:
        raise Failed(Exit.NO_BACKEND, f"{name}:{device} is not available: {reason}")
    run = _run(record, name, device, report)
    run["environment"] = environment.environment(device)
    run["versions"] = environment.versions() | tested.backend.versions()
    run["precision"] = tested.framework.policy()
    with progress(f"bench of {name}:{device}") as show:
        run["speed"] = found = speed.measure(
            name,
            device,
            grid=grid,
            peers=against,
            threads=threads,
            say=lambda title, share: show(share),
        )
    if report is not None:
        others = (
            []
            if not report.exists()
            else [
                other
                for other in record.load(report)["runs"]
                if (other["backend"], other["device"]) != (name, device)
            ]
        )
        record.save(report, [*others, run], replace=True)
        note(f"record: {report}")
    if as_json:
        emit(run)
    else:
        speed_table.show(run, stdout())
    if found["red"]:
        raise Failed(Exit.NUMERICS, "the numerics are red, so nothing is said about speed")
    measured: Any = found
    unmet = [
        str(entry.get("name") or entry.get("peer") or entry.get("spec"))
        for group in ("ratios", "growth", "memory", "figures")
        for entry in measured[group]
        if entry["met"] is False
    ]
    if strict and unmet:
        raise Failed(Exit.UNMET, f"not met: {', '.join(unmet)}")


def _run(record: Any, name: str, device: str, report: Path | None) -> Run:
    """Give the run of a record that the speed belongs to, a new one where there is none."""
    if report is not None and report.exists():
        for known in record.load(report)["runs"]:
            if (known["backend"], known["device"]) == (name, device):
                found: Run = known
                return found
    made: Run = record.new_run(name, device)
    return made


def _list(peers: Any, device: str, as_json: bool) -> None:
    found = [
        {
            "peer": peer.name,
            "computes": list(peer.computes or ()),
            "backward": peer.backward,
            "missing": peer.missing(device),
        }
        for peer in peers.PEERS.values()
    ]
    if as_json:
        emit({"peers": found})
        return
    table = Table("peer", "computes", "backward", f"on {device}")
    for entry in found:
        table.add_row(
            escape(entry["peer"]),
            escape(", ".join(entry["computes"])),
            "yes" if entry["backward"] else "",
            escape(entry["missing"] or "available"),
        )
    stdout().print(table)
