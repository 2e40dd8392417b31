"""The findings in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import wording
from .verdict import CONFIRMED, DENIED, IN_PART, NOT_SHOWN

__all__ = ["show"]

COLOURS = {CONFIRMED: "green", DENIED: "red", IN_PART: "yellow", NOT_SHOWN: "yellow"}


def show(record: Mapping[str, Any], findings: Mapping[str, Any], console: Console) -> None:
    """Print the tables, the data sets that are missing, and the verdicts."""
    _table(console, "Accuracy", wording.ACCURACY, wording.accuracy_rows(findings))
    _table(console, "Ranks over the data sets", wording.RANKING, wording.ranking_rows(findings))
    console.print(escape(wording.ranks_together(findings)), soft_wrap=True)
    _table(console, "Distance of heads", wording.REDUNDANCY, wording.redundancy_rows(findings))
    _table(console, "Cost", wording.COST, wording.cost_rows(findings))
    _table(console, "Claims", wording.CLAIM, wording.claim_rows(findings))
    for name, reason in findings["absent"].items():
        console.print(f"{escape(name)}: not measured, {escape(reason)}", soft_wrap=True)
    for text, verdict in wording.sentences(findings):
        console.print(f"[bold]{escape(text)}[/]: {_coloured(verdict)}", soft_wrap=True)


def _table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    before = ""
    for row in rows:
        if before and row[0] not in ("", before):
            table.add_section()
        before = row[0] or before
        table.add_row(*(_coloured(cell) if cell in COLOURS else escape(cell) for cell in row))
    console.print(table)


def _coloured(verdict: str) -> str:
    return f"[{COLOURS[verdict]}]{verdict}[/]"
