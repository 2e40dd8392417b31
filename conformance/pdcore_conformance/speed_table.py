"""A record of `pdcore_conformance.speed` as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

__all__ = ["show"]


def show(record: Mapping[str, Any], console: Any) -> None:
    """Print a record as tables, on a rich console."""
    where = record["environment"]
    console.print(
        escape(
            f"{record['backend']} ({', '.join(f'{n} {v}' for n, v in record['versions'].items())}),"
            f" float32, {record['threads']} threads on {where['cpu']}, {where['cores']} cores, "
            f"load {where['load']:.2f}; Python {where['python']}"
        ),
        soft_wrap=True,
    )
    for note in record["notes"]:
        console.print(escape(note))
    red = Table("numerics", "shape", "by", "error / budget")
    for row in record["numerics"]:
        errors = ", ".join(f"{n} {r:.3f}" for n, r in row["error_over_budget"].items())
        red.add_row(
            escape(row["spec"]), escape(str(tuple(row["shape"]))), escape(row["by"]),
            escape(errors) if row["ok"] else f"[bold red]{escape(errors)}",
        )  # fmt: skip
    console.print(red)
    table = Table("figure", "value", "95 % interval", "target", "")
    for entry in record["figures"]:
        span = entry.get("interval")
        table.add_row(
            escape(entry["name"] + _baseline(entry)),
            f"{entry['value']:.3g} {entry['unit']}",
            "" if span is None else f"{span[0]:.3g} to {span[1]:.3g}",
            _target(entry),
            {True: "met", False: "[bold red]NOT MET", None: "not judged"}[entry["met"]],
        )
    if record["figures"]:
        console.print(table)


def _baseline(entry: Mapping[str, Any]) -> str:
    return f" ({entry['baseline']})" if "baseline" in entry else ""


def _target(entry: Mapping[str, Any]) -> str:
    low, high = entry["at_least"], entry["at_most"]
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f">= {low:g}" if low is not None else f"<= {high:g}"
