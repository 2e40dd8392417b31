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

#: By this a page is known for one that may be replaced.
GENERATOR = "pdcore reproduce"

#: Of a verdict, in the style of the pages.
KINDS = {CONFIRMED: "good", DENIED: "bad"}

_ALT = {
    "accuracy": "Test accuracy of every seed, attention and data set; the first table has them.",
    "redundancy": "Distances of heads over those of softmax, before and after training.",
    "cost": "Operations, time and peak memory over those of softmax, against N and against D.",
}


def page(record: Mapping[str, Any], found: Mapping[str, Any], pngs: Mapping[str, bytes]) -> str:
    """Lay the findings out as HTML that needs nothing else.

    Parameters
    ----------
    record, found : mapping
        The results, and what `reproduction.findings.findings` makes of them.
    pngs : mapping of str to bytes
        As `reproduction.pictures.pictures` draws them.

    Returns
    -------
    str
    """
    return render(
        "reproduce",
        generator=GENERATOR,
        about=_about(record),
        sentences=[
            (text, verdict, KINDS.get(verdict, "")) for text, verdict in wording.sentences(found)
        ],
        claims=_table(wording.CLAIM, wording.claim_rows(found)),
        sections=[
            (
                "accuracy",
                "Accuracy",
                _table(wording.ACCURACY, wording.accuracy_rows(found)),
                _ALT["accuracy"],
            ),
            (
                "redundancy",
                "Distance of heads",
                _table(wording.REDUNDANCY, wording.redundancy_rows(found)),
                _ALT["redundancy"],
            ),
            ("cost", "Cost", _table(wording.COST, wording.cost_rows(found)), _ALT["cost"]),
        ],
        pictures={
            name: "data:image/png;base64," + base64.b64encode(png).decode()
            for name, png in pngs.items()
        },
        protocol=record["protocol"],
        level=found["level"],
        absent=found["absent"],
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
