"""The tables and notes of measurements that the page shows beside the plots."""

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
    """Return a unit as text after a number, short enough for a cell of one line."""
    return {"us": " µs", "x": "×"}.get(unit, f" {wording.cut(unit, 16)}")


def memory(record: Record) -> tuple[list[str], list[Row]]:
    """Return the names of the runs that measured peak memory, and a row for each call."""
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
    for (spec, detail), entries in lines.items():
        cells = []
        for index in range(len(runs)):
            if (entry_or_none := entries.get(index)) is None:
                cells.append(Cell(""))
                continue
            aim = wording.aim(None, entry_or_none["at_most"])
            cells.append(_judged(wording.number(entry_or_none["mib"]), aim, entry_or_none["met"]))
        rows.append(Row(spec, tuple(cells), detail))
    return [target(run) for run in runs], rows


@dataclass(frozen=True)
class Figures:
    """The other figures of a run, with notes that apply to all of its figures."""

    name: str
    about: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


def figures(run: Run) -> Figures | None:
    """Return the other figures of a run; None where nothing was measured."""
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
                _judged("", wording.aim(f["at_least"], f["at_most"]), f["met"]),
            ),
        )
        for f in speed["figures"]
    )
    return Figures(target(run), about, tuple(speed["notes"]), rows)


def gate(record: Record) -> list[Row]:
    """Return a row for each run that was timed: how its numbers were before."""
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
        state = "green" if not speed["red"] else "red: nothing is claimed about its speed"
        rows.append(
            Row(
                target(run),
                (
                    Cell(f"{len(speed['numerics']):,}"),
                    Cell("")
                    if worst is None
                    else Cell(wording.over_budget(worst), f"h{step(worst)}"),
                    Cell(state, "bad" if speed["red"] else "good"),
                ),
                listed,
            )
        )
    return rows


def missing_peers(record: Record) -> list[tuple[str, str, str]]:
    """Return the peers that could not be measured: the backends concerned, the peer, why."""
    backends: dict[tuple[str, str], list[str]] = {}
    for run in record["runs"]:
        for entry in run["speed"]["missing_peers"] if run["speed"] else ():
            backends.setdefault((entry["peer"], entry["reason"]), []).append(target(run))
    return [(", ".join(where), peer, reason) for (peer, reason), where in backends.items()]


def missing_by_reason(record: Record) -> list[tuple[str, list[str], str]]:
    """Return the missing peers with those together that are missing for the same reason."""
    peers: dict[tuple[str, str], list[str]] = {}
    for where, peer, reason in missing_peers(record):
        peers.setdefault((where, reason), []).append(peer)
    return [(where, names, reason) for (where, reason), names in peers.items()]


def uneven(record: Record) -> str:
    """Return the differences between the machines of runs that were timed, or an empty text."""
    timed = [run["environment"] for run in record["runs"] if run["speed"]]
    differing = [
        name
        for name, values in (
            ("processors", {e["cpu"] for e in timed}),
            ("numbers of cores", {e["cores"] for e in timed}),
            ("GPUs", {e["gpu"]["name"] if e["gpu"] else None for e in timed}),
        )
        if len(values) > 1
    ]
    return ", ".join(differing)
