"""The measurements of the demo in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["show"]


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the table of measurements, and the paths of the pictures."""
    q = tuple(result["shape"]["q"])
    table = Table(title=f"Japanese vowels, q {q} float32", title_justify="left")
    for name in ("preset", "backend"):
        table.add_column(name, overflow="fold")
    for name in ("error / budget", "ms", "x softmax", "head distance"):
        table.add_column(name, justify="right")
    for preset in result["presets"]:
        for name, measured in preset["backends"].items():
            distance = f"{preset['redundancy']['mean']:.3f}"
            table.add_row(escape(preset["spec"]), escape(name), *_cells(measured), distance)
    console.print(table)
    console.print(
        "error / budget: up to 1 is what rounding explains. head distance: mean L2 distance "
        "between two heads' weights, over all utterances; the smaller, the more redundant. "
        "Short sequences: the times are mostly overhead; `pdcore bench` has long ones."
    )
    console.print(escape(result["dataset"]))
    for path in result["files"]:
        console.print(f"wrote {escape(path)}", soft_wrap=True)


def _cells(measured: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return error, time and ratio of one backend, or why it did not run."""
    if "milliseconds" not in measured:
        return escape(measured.get("refused") or measured["failed"]), "", ""
    error, ratio = measured["error_over_budget"], measured["versus_softmax"]
    colour = "" if error <= 1.0 else "[bold red]"
    return (
        f"{colour}{error:.3f}",
        f"{measured['milliseconds']:.2f}",
        "" if ratio is None else f"{ratio:.2f}",
    )
