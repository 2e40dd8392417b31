"""Figures and verdicts as text, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .findings import CLAIMS
from .protocol import BASELINE, MEASURES

__all__ = [
    "accuracy_rows",
    "claim_rows",
    "cost_rows",
    "ranking_rows",
    "ranks_together",
    "redundancy_rows",
    "sentences",
]

#: The texts of a row; verdicts are those of `reproduction.verdict`.
Row = tuple[str, ...]

ACCURACY = (
    "data",
    "attention",
    "test %",
    "seeds",
    "validation %",
    "minus softmax's",
    "epochs",
    "s",
)
REDUNDANCY = ("data", "attention", *(f"{m}, layer by layer" for m in MEASURES), "untrained maps")
COST = (
    "N",
    "D",
    "attention",
    "MFLOP, attention",
    "MFLOP, model",
    "× softmax",
    "ms a step",
    "time × softmax",
    "MiB",
    "memory × softmax",
)
RANKING = (
    "attention",
    "mean rank",
    "sets better, worse",
    "minus softmax's",
    "signed ranks, p",
    "Holm",
    "could be shown",
)
CLAIM = ("attention", "claim", "figure", "value", "verdict")


def sentences(findings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the sentence about every spec, with its verdict."""
    whole = " and ".join([", ".join(list(CLAIMS.values())[:-1]), list(CLAIMS.values())[-1]])
    return [(f"{row['spec']} {whole}", row["verdict"]) for row in findings["sentences"]]


def claim_rows(findings: Mapping[str, Any]) -> list[Row]:
    """Return a row for every claim, and below each a row for every figure of it."""
    rows: list[Row] = []
    for claim in findings["claims"]:
        rows.append((claim["spec"], CLAIMS[claim["claim"]], "", "", claim["verdict"]))
        for part in claim["parts"]:
            rows.append(("", "", part["what"], _value(claim["claim"], part), part["verdict"]))
    return rows


def _value(claim: str, part: Mapping[str, Any]) -> str:
    """Return a figure with its interval, and its value before training."""
    if claim == "accuracy":
        return _points([part["value"], part["low"], part["high"]])
    text = _ratio([part["value"], part["low"], part["high"]])
    if "untrained" in part:
        text += f"; untrained {part['untrained'][0]:.2f}"
    return text


def _points(estimate: Sequence[float]) -> str:
    value, low, high = (100 * x for x in estimate)
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def _ratio(estimate: Sequence[float]) -> str:
    value, low, high = estimate
    if low == value == high:
        return f"{value:.3f}"
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def ranking_rows(findings: Mapping[str, Any]) -> list[Row]:
    """Return a row for every spec, the best mean rank first, as `RANKING` names the columns."""
    rows: list[Row] = []
    for row in findings["ranking"]:
        rank = f"{row['rank']:.2f}"
        if "holm" not in row:
            rows.append((row["spec"], rank, "", "", "", "", ""))
            continue
        least = row["detectable"]
        rows.append(
            (
                row["spec"],
                rank,
                f"{row['better']}, {row['worse']}",
                _points(row["difference"]),
                f"{row['wilcoxon']:.3f}",
                f"{row['holm']:.3f}",
                "" if least is None else f"{100 * least:.1f} points",
            )
        )
    return rows


def ranks_together(findings: Mapping[str, Any]) -> str:
    """Return what the ranks of all attentions together say."""
    ranks = findings["ranks"]
    if ranks["friedman"] is None:
        return "Too few data sets or attentions for a test of ranks."
    return (
        f"Friedman's test over {ranks['sets']} data sets that all attentions are equal: p = "
        f"{ranks['friedman']:.3f}. Two mean ranks are told apart from {ranks['critical']:.2f} on "
        "(Nemenyi, 5 %)."
    )


def accuracy_rows(findings: Mapping[str, Any]) -> list[Row]:
    """Return a row for every data set and spec, as `ACCURACY` names the columns."""
    return [
        (
            row["data"],
            row["spec"],
            f"{100 * row['mean']:.1f} ± {100 * row['deviation']:.1f}",
            ", ".join(f"{100 * a:.1f}" for a in row["each"]),
            f"{100 * row['validation']:.1f}",
            "" if row["difference"] is None else _points(row["difference"]),
            ", ".join(map(str, row["epochs"])),
            f"{row['seconds']:.0f}",
        )
        for row in findings["accuracy"]
    ]


def redundancy_rows(findings: Mapping[str, Any]) -> list[Row]:
    """Return a row for every data set and spec, as `REDUNDANCY` names the columns."""
    return [
        (
            row["data"],
            row["spec"],
            *(", ".join(f"{d:.3g}" for d in row["trained"][measure]) for measure in MEASURES),
            ", ".join(f"{d:.3g}" for d in row["untrained"]["maps"]),
        )
        for row in findings["redundancy"]
    ]


def cost_rows(findings: Mapping[str, Any]) -> list[Row]:
    """Return a row for every size and spec, as `COST` names the columns."""
    return [
        (
            str(row["length"]),
            str(row["dim"]),
            row["spec"],
            f"{row['flops']['attention'] / 1e6:.1f}",
            f"{row['flops']['model'] / 1e6:.1f}",
            f"{row['attention_ratio']:.3f}, {row['model_ratio']:.3f}",
            f"{row['milliseconds']:.1f}",
            "" if row["spec"] == BASELINE else _ratio(row["time_ratio"]),
            "not known" if row["mib"] is None else f"{row['mib']:.1f}",
            ""
            if row["spec"] == BASELINE or row["memory_ratio"] is None
            else _ratio(row["memory_ratio"]),
        )
        for row in findings["cost"]
    ]
