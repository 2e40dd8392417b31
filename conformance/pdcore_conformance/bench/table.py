"""Print the measurements of `pdcore_conformance.bench.speed` as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..record.writing import Run

__all__ = ["show", "show_rows"]


#: The columns of a table that is printed elsewhere than on a terminal.
WIDTH = 140


def show_rows(run: Run, console: Any) -> None:
    """Print the rows of `pdcore_conformance.bench.rows` in a run, with a column for each shape."""
    speed: Any = run["speed"]
    _circumstances(run, console)
    shapes = dict.fromkeys(tuple(entry["shape"]) for entry in speed["ratios"])
    cells: dict[tuple[str, str, str], dict[tuple[int, ...], str]] = {}
    for entry in speed["ratios"]:
        row = cells.setdefault((entry["spec"], entry["peer"], entry["direction"]), {})
        row[tuple(entry["shape"])] = _time(entry)
    table = Table("call", "over the time of", "direction", *(escape(str(s)) for s in shapes))
    for labels, row in cells.items():
        table.add_row(*map(escape, labels), *(row.get(shape, "") for shape in shapes))
    if cells:
        console.print(table, width=None if console.is_terminal else WIDTH)
        console.print("times, less is faster: <= a goal that is met, > a goal that is not met")
    _absent(speed, console)


def _time(entry: Mapping[str, Any]) -> str:
    """Return the time of a call over the other's, and its goal."""
    time, least = 1 / entry["ratio"], entry["at_least"]
    if least is None:
        return f"{time:.3g}"
    text = f"{time:.3g} {'<=' if entry['met'] else '>'} {1 / least:.3g}"
    return text if entry["met"] else f"[bold red]{text}"


def show(run: Run, console: Any) -> None:
    """Print the speed of a run on a rich console."""
    speed: Any = run["speed"]
    _circumstances(run, console)
    _numerics(speed["numerics"], console)
    _measured(speed, console)
    _absent(speed, console)


def _circumstances(run: Run, console: Any) -> None:
    """Print on which machine, with which libraries and how a run was measured."""
    speed: Any = run["speed"]
    machine = run["environment"]
    versions = ", ".join(f"{name} {text}" for name, text in run["versions"].items())
    load = "" if speed["load"] is None else f", load {speed['load']:.2f}"
    device = machine["gpu"]["name"] if machine["gpu"] else _cpu(machine)
    lines = [
        f"{run['backend']}:{run['device']}, {speed['threads']} threads on {device}{load}",
        versions,
        *speed["notes"],
    ]
    console.print(escape("\n".join(lines)), soft_wrap=True)


def _measured(speed: Any, console: Any) -> None:
    ratios = Table("call", "against", "times as fast", "95 % interval", "target", "")
    for entry in speed["ratios"]:
        ratios.add_row(
            escape(_call(entry)),
            escape(entry["peer"]),
            f"{entry['ratio']:.3g}",
            _interval(entry),
            _target(entry),
            _met(entry),
        )
    growth = Table("growth of time", "from", "to", "factor", "95 % interval", "target", "")
    for entry in speed["growth"]:
        growth.add_row(
            escape(entry["spec"]),
            str(entry["from"]),
            str(entry["to"]),
            f"{entry['factor']:.3g}",
            _interval(entry),
            _target(entry),
            _met(entry),
        )
    memory = Table("peak memory beside inputs and results", "seen by", "MiB", "target", "")
    for entry in speed["memory"]:
        memory.add_row(
            escape(_call(entry)),
            entry["way"],
            f"{entry['mib']:.1f}",
            _target({"at_least": None, **entry}),
            _met(entry),
        )
    figures = Table("figure", "value", "95 % interval", "target", "")
    for entry in speed["figures"]:
        figures.add_row(
            escape(entry["name"]),
            f"{entry['value']:.3g} {entry['unit']}",
            _interval(entry),
            _target(entry),
            _met(entry),
        )
    for table in (ratios, growth, memory, figures):
        if table.row_count:
            console.print(table)


def _absent(speed: Any, console: Any) -> None:
    for absent in speed["missing_peers"]:
        console.print(
            escape(f"not compared with {absent['peer']}: {absent['reason']}"), soft_wrap=True
        )


def _numerics(entries: Any, console: Any) -> None:
    table = Table("numerics", "by", "error / budget")
    for entry in entries:
        errors = ", ".join(f"{n} {r:.2g}" for n, r in entry["error_over_budget"].items())
        colour = "" if entry["ok"] else "[bold red]"
        table.add_row(
            escape(_call({"direction": "", **entry})),
            escape(entry["by"]),
            f"{colour}{escape(errors)}",
        )
    console.print(table)


def _cpu(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores"


def _call(entry: Mapping[str, Any]) -> str:
    shape = ",".join(map(str, entry["shape"]))
    backward = " and backward" if entry["direction"] == "forward+backward" else ""
    return f"{entry['spec']} ({shape}) {entry['dtype']}{backward}"


def _interval(entry: Mapping[str, Any]) -> str:
    ends = entry["interval"]
    return "" if ends is None else f"{ends[0]:.3g} to {ends[1]:.3g}"


def _target(entry: Mapping[str, Any]) -> str:
    low, high = entry["at_least"], entry["at_most"]
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    if low is None and high is None:
        return ""
    return f">= {low:.3g}" if low is not None else f"<= {high:.3g}"


def _met(entry: Mapping[str, Any]) -> str:
    return {True: "met", False: "[bold red]NOT MET", None: ""}[entry["met"]]
