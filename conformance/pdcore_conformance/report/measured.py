"""What the page shows of measurements beside the plots: tables and notes."""

from __future__ import annotations

from dataclasses import dataclass

from ..record.writing import Memory, Record, Run, target
from . import wording
from .heat import largest, step
from .view import Cell, Row

__all__ = ["Figures", "figures", "gate", "memory", "missing_by_reason", "missing_peers", "uneven"]

_MET = {True: "good", False: "bad", None: ""}


def _judged(text: str, aim: str, met: bool | None) -> Cell:
    word = {True: "met", False: "not met", None: ""}[met]
    more = ", ".join(part for part in (aim, word) if part)
    return Cell(f"{text} ({more})" if more and text else text or more, _MET[met])


def _unit(unit: str) -> str:
    """Write a unit as it stands after a number; the cells of numbers have one line each."""
    return {"us": " µs", "x": "×"}.get(unit, f" {wording.cut(unit, 16)}")


def memory(record: Record) -> tuple[list[str], list[Row]]:
    """Give the peak memory of each call: who measured it, and a line for each call."""
    runs = [run for run in record["runs"] if run["speed"] and run["speed"]["memory"]]
    lines: dict[tuple[str, str], dict[int, Memory]] = {}
    for index, run in enumerate(runs):
        for entry in run["speed"]["memory"] if run["speed"] else ():
            detail = (
                f"{wording.shape(entry['shape'])} {entry['dtype']}, {entry['direction']}, "
                f"{entry['way']}"
            )
            lines.setdefault((entry["spec"], detail), {})[index] = entry
    rows = []
    for (spec, detail), found in lines.items():
        cells = []
        for index in range(len(runs)):
            if (entry_or_none := found.get(index)) is None:
                cells.append(Cell(""))
                continue
            aim = wording.target(None, entry_or_none["at_most"])
            cells.append(_judged(wording.number(entry_or_none["mib"]), aim, entry_or_none["met"]))
        rows.append(Row(spec, tuple(cells), detail))
    return [target(run) for run in runs], rows


@dataclass(frozen=True)
class Figures:
    """The other figures of a run, and what to know about all of its figures."""

    name: str
    about: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


def figures(run: Run) -> Figures | None:
    """Give what a run measured besides; None where it measured nothing."""
    speed = run["speed"]
    if speed is None:
        return None
    threads = "not limited" if speed["threads"] is None else str(speed["threads"])
    about = f"{speed['grid']} grid, threads: {threads}, load before: "
    about += wording.number(speed["load"]) or "unknown"
    rows = tuple(
        Row(
            f["name"],
            (
                Cell(wording.number(f["value"]) + _unit(f["unit"])),
                Cell(wording.interval(f["interval"])),
                _judged("", wording.target(f["at_least"], f["at_most"]), f["met"]),
            ),
        )
        for f in speed["figures"]
    )
    return Figures(target(run), about, tuple(speed["notes"]), rows)


def gate(record: Record) -> list[Row]:
    """Say for each run that was timed how its numbers stood before."""
    rows = []
    for run in record["runs"]:
        speed = run["speed"]
        if speed is None:
            continue
        worst = largest(r for e in speed["numerics"] for r in e["error_over_budget"].values())
        bad = [entry for entry in speed["numerics"] if not entry["ok"]]
        listed = "; ".join(
            f"{e['spec']} {wording.shape(e['shape'])} {e['dtype']} by {e['by']}" for e in bad[:20]
        )
        said = "green" if not speed["red"] else "red: nothing is claimed about its speed"
        rows.append(
            Row(
                target(run),
                (
                    Cell(f"{len(speed['numerics']):,}"),
                    Cell("")
                    if worst is None
                    else Cell(wording.over_budget(worst), f"h{step(worst)}"),
                    Cell(said, "bad" if speed["red"] else "good"),
                ),
                listed,
            )
        )
    return rows


def missing_peers(record: Record) -> list[tuple[str, str, str]]:
    """List who could not be measured against, by which backends, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in record["runs"]:
        for entry in run["speed"]["missing_peers"] if run["speed"] else ():
            found.setdefault((entry["peer"], entry["reason"]), []).append(target(run))
    return [(", ".join(where), peer, reason) for (peer, reason), where in found.items()]


def missing_by_reason(record: Record) -> list[tuple[str, list[str], str]]:
    """List the same with the peers together that are missing for one reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for where, peer, reason in missing_peers(record):
        found.setdefault((where, reason), []).append(peer)
    return [(where, peers, reason) for (where, reason), peers in found.items()]


def uneven(record: Record) -> str:
    """Say what differs between the machines of runs that were timed, or nothing."""
    timed = [run["environment"] for run in record["runs"] if run["speed"]]
    differing = [
        name
        for name, found in (
            ("processors", {e["cpu"] for e in timed}),
            ("numbers of cores", {e["cores"] for e in timed}),
            ("GPUs", {e["gpu"]["name"] if e["gpu"] else None for e in timed}),
        )
        if len(found) > 1
    ]
    return ", ".join(differing)
