"""The findings as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import pdcore
from pdcore_conformance.report.templating import asset, render

from . import wording
from .verdict import CONFIRMED, DENIED

__all__ = ["GENERATOR", "page"]

#: The generator that a page names; such a page may be replaced.
GENERATOR = "pdcore reproduce"

#: The class of a verdict in the style sheet.
KINDS = {CONFIRMED: "good", DENIED: "bad"}

_ALT = {
    "accuracy": "Test accuracy minus softmax's, of every attention, with its interval.",
    "ranking": "Critical-difference diagram: mean ranks, and from each the critical difference.",
    "redundancy": "Distances of heads over those of softmax, before and after training.",
    "cost": "Operations, time and peak memory of every attention over those of softmax.",
}


def page(record: Mapping[str, Any], findings: Mapping[str, Any], pngs: Mapping[str, bytes]) -> str:
    """Return the findings as HTML that needs no other file.

    Parameters
    ----------
    record, findings : mapping
        The record of the cells, and the findings of `reproduction.findings.findings`.
    pngs : mapping of str to bytes
        The PNG files of `reproduction.pictures.pictures`.

    Returns
    -------
    str
    """
    return render(
        ".",
        package="reproduction",
        generator=GENERATOR,
        about=_about(record),
        sentences=[
            (text, verdict, KINDS.get(verdict, "")) for text, verdict in wording.sentences(findings)
        ],
        claims=_table(wording.CLAIM, wording.claim_rows(findings)),
        sections=[
            (
                "accuracy",
                "Accuracy",
                _table(wording.ACCURACY, wording.accuracy_rows(findings)),
                _ALT["accuracy"],
            ),
            (
                "ranking",
                "Ranks over the data sets",
                _table(wording.RANKING, wording.ranking_rows(findings)),
                f"{_ALT['ranking']} {wording.ranks_together(findings)}",
            ),
            (
                "redundancy",
                "Distance of heads",
                _table(wording.REDUNDANCY, wording.redundancy_rows(findings)),
                _ALT["redundancy"],
            ),
            ("cost", "Cost", _table(wording.COST, wording.cost_rows(findings)), _ALT["cost"]),
        ],
        pictures={
            name: "data:image/png;base64," + base64.b64encode(png).decode()
            for name, png in pngs.items()
        },
        protocol=record["protocol"],
        level=findings["level"],
        absent=findings["absent"],
        data=record["data"],
        versions=record["versions"],
        machine=record["machine"],
        kinds=KINDS,
        **asset("style", "style.css"),
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {"columns": columns, "rows": rows}


def _about(record: Mapping[str, Any]) -> str:
    commits = ", ".join(record["commits"])
    return (
        f"pdcore {pdcore.__version__}, commit {commits}; {record['protocol']['name']} grid, "
        f"{record['created']} to {record['updated']}; PyTorch {record['versions']['torch']} on "
        f"{record['machine']['cpu']}, one thread."
    )
