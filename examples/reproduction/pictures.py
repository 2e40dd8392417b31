"""The plots: accuracy, ranks, distance of heads, and cost, each attention on a line."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

# Not pyplot, which keeps global state and may look for a display.
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .protocol import BASELINE, MEASURES

__all__ = ["pictures"]

# Told apart by readers who do not see all colours (Okabe and Ito), and in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vP*"
GREY = "#888c92"
_TITLES = {"maps": "attention maps", "outputs": "outputs", "relative": "outputs / norm"}


def pictures(record: Mapping[str, Any], findings: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the plots.

    Parameters
    ----------
    record, findings : mapping
        The record of the cells, and the findings of `reproduction.findings.findings`.

    Returns
    -------
    dict of str to bytes
        PNG files by name.
    """
    drawn = {
        "accuracy": _accuracy(findings),
        "ranking": _ranking(findings),
        "redundancy": _redundancy(findings),
        "cost": _cost(findings, record["protocol"]["sizes"]),
    }
    pngs = {}
    for name, figure in drawn.items():
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=120)
        pngs[name] = stream.getvalue()
    return pngs


def _lines(specs: Sequence[str], titles: Sequence[str], below: str) -> tuple[Figure, Any]:
    """Return a figure with a panel for each title, and a line for each spec in all of them."""
    figure = Figure(figsize=(9.0, 1.6 + 0.3 * len(specs)), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(below, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", color="#e3e5e8", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    panels[0].set_yticks(range(len(specs)), [_short(spec) for spec in specs])
    panels[0].set_ylim(len(specs) - 0.5, -0.5)
    return figure, panels


def _interval(axes: Any, at: float, estimate: Sequence[float], **style: Any) -> None:
    value, low, high = estimate
    axes.plot([low, high], [at, at], "-", color=style["color"], linewidth=1.5)
    axes.plot([value], [at], markersize=6, **style)


def _accuracy(findings: Mapping[str, Any]) -> Figure:
    """Draw each attention's difference from softmax: a dot for each data set, and the mean."""
    rows = {row["spec"]: row for row in findings["ranking"] if row["spec"] != BASELINE}
    specs = [row["spec"] for row in findings["sentences"]]
    figure, [axes] = _lines(specs, ["Test accuracy minus softmax's"], "points")
    for at, spec in enumerate(specs):
        each = [100 * row["difference"][0] for row in findings["accuracy"] if row["spec"] == spec]
        axes.plot(each, [at] * len(each), "o", color=GREY, markersize=4, alpha=0.6)
        mean = [100 * x for x in rows[spec]["difference"]]
        _interval(axes, at, mean, color=COLOURS[0], marker="D")
    axes.axvline(0.0, color=GREY, linewidth=1)
    figure.supxlabel(
        "Grey: data sets, mean of the seeds. Blue: mean of the data sets, 95 % interval", fontsize=9
    )
    return figure


def _ranking(findings: Mapping[str, Any]) -> Figure:
    """Draw the critical-difference diagram: mean ranks, and from each the critical difference."""
    rows, critical = findings["ranking"], findings["ranks"]["critical"]
    specs, ranks = [row["spec"] for row in rows], [row["rank"] for row in rows]
    figure, [axes] = _lines(specs, ["Mean rank over the data sets, 1 the best"], "")
    axes.plot(ranks, range(len(ranks)), "o", color=COLOURS[0])
    for place, rank in enumerate(ranks):
        end = min(rank + critical, len(ranks))
        axes.plot([rank, end], [place, place], "-", color=GREY, linewidth=1, zorder=0)
    figure.supxlabel(
        f"Grey: the critical difference, {critical:.2f} (Nemenyi, 5 %). Two attentions are told "
        "apart where the dot of one lies beyond the other's line",
        fontsize=9,
    )
    return figure


def _redundancy(findings: Mapping[str, Any]) -> Figure:
    """Draw the distances of heads over softmax's, trained and untrained, over all data sets."""
    claims = {c["spec"]: c for c in findings["claims"] if c["claim"] == "redundancy"}
    specs = list(claims)
    figure, panels = _lines(specs, [_TITLES[m] for m in MEASURES], "× softmax")
    for place, axes in enumerate(panels):
        for at, spec in enumerate(specs):
            part = claims[spec]["parts"][place]
            trained = (part["value"], part["low"], part["high"])
            _interval(axes, at - 0.12, trained, color=COLOURS[0], marker="o")
            _interval(
                axes, at + 0.18, part["untrained"], color=GREY, marker="o", markerfacecolor="none"
            )
        axes.axvline(1.0, color=GREY, linewidth=1)
    figure.supxlabel(
        "Distance of heads, geometric mean over the data sets with its interval. Hollow: before "
        "training",
        fontsize=9,
    )
    return figure


def _cost(findings: Mapping[str, Any], sizes: Sequence[Sequence[int]]) -> Figure:
    """Draw operations, time and memory over softmax's, a mark for each size."""
    columns = {
        "operations, model": lambda row: [row["model_ratio"]] * 3,
        "time of a step": lambda row: row["time_ratio"],
        "peak memory": lambda row: row["memory_ratio"],
    }
    specs = [s for s in dict.fromkeys(row["spec"] for row in findings["cost"]) if s != BASELINE]
    figure, panels = _lines(specs, list(columns), "× softmax")
    for axes, ratio in zip(panels, columns.values(), strict=True):
        for place, (length, dim) in enumerate(sizes):
            for row in findings["cost"]:
                if [row["length"], row["dim"]] != [length, dim] or row["spec"] not in specs:
                    continue
                if (estimate := ratio(row)) is None:
                    continue
                at = specs.index(row["spec"]) + 0.6 * (place / max(1, len(sizes) - 1) - 0.5)
                colour, mark = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
                label = f"N {length}, D {dim}" if row["spec"] == specs[0] else None
                _interval(axes, at, estimate, color=colour, marker=mark, label=label)
        axes.axvline(1.0, color=GREY, linewidth=1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(sizes), fontsize=9, frameon=False
    )
    return figure


def _short(spec: str) -> str:
    """Return a spec without the kernel that most share."""
    return spec.removeprefix(f"{BASELINE}+")
