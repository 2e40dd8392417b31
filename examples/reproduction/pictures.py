"""The plots: accuracy, distance of heads, and cost against N and D."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Not pyplot, which keeps global state and may look for a display.
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .protocol import BASELINE, MEASURES

__all__ = ["pictures"]

# Told apart by readers who do not see all colours (Okabe and Ito), and in print.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = "osD^vP*"
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
    specs = record["protocol"]["specs"]
    drawn = {
        "accuracy": _accuracy(findings["accuracy"], specs),
        "redundancy": _redundancy(findings["redundancy"], specs),
        "cost": _cost(findings["cost"], specs, record["protocol"]["sizes"]),
    }
    pngs = {}
    for name, figure in drawn.items():
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=120)
        pngs[name] = stream.getvalue()
    return pngs


def _accuracy(rows: Sequence[Mapping[str, Any]], specs: Sequence[str]) -> Figure:
    """Draw every seed, with mean and deviation, a panel for each data set."""
    data = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(9.0, 1.0 + 1.35 * -(-len(data) // 2) * 1.5), layout="constrained")
    panels = figure.subplots(-(-len(data) // 2), min(2, len(data)), squeeze=False).flat
    for axes, name in zip(panels, data, strict=False):
        of_data = [row for row in rows if row["data"] == name]
        for place, row in enumerate(of_data):
            colour, mean, spread = COLOURS[place % len(COLOURS)], row["mean"], row["deviation"]
            each = [100 * a for a in row["each"]]
            axes.plot(
                each,
                [place] * len(each),
                "o",
                color=colour,
                markersize=5,
                alpha=0.45,
                markeredgewidth=0,
            )
            axes.errorbar(
                100 * mean,
                place,
                xerr=100 * spread,
                fmt="|",
                color=colour,
                markersize=14,
                markeredgewidth=2,
                capsize=3,
            )
        axes.set_yticks(range(len(of_data)), [_short(spec) for spec in specs])
        axes.set_ylim(len(of_data) - 0.5, -0.5)
        axes.margins(x=0.1)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("test accuracy, %", fontsize=9)
        _plain(axes, "x")
    for axes in list(panels):
        axes.set_visible(False)
    figure.suptitle("Dots: seeds. Bar: mean ± standard deviation", fontsize=10)
    return figure


def _redundancy(rows: Sequence[Mapping[str, Any]], specs: Sequence[str]) -> Figure:
    """Draw distances over those of the baseline, layer by layer, trained and untrained."""
    data = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    by = {(row["data"], row["spec"]): row for row in rows}
    for axes, measure in zip(panels, MEASURES, strict=True):
        ticks = []
        for block, name in enumerate(data):
            base = by[name, BASELINE]
            for place, spec in enumerate(specs[1:], 1):
                row = by[name, spec]
                at = block * (len(specs) + 0.5) + place
                for when, filled in (("untrained", False), ("trained", True)):
                    ratios = [
                        a / b for a, b in zip(row[when][measure], base[when][measure], strict=True)
                    ]
                    colour = COLOURS[place % len(COLOURS)]
                    axes.plot(
                        ratios,
                        [
                            at + 0.18 * (2 * layer - len(ratios) + 1) / max(1, len(ratios) - 1)
                            for layer in range(len(ratios))
                        ],
                        MARKERS[place % len(MARKERS)],
                        color=colour,
                        markersize=5,
                        markerfacecolor=colour if filled else "none",
                        linestyle="none",
                    )
            ticks.append(block * (len(specs) + 0.5) + len(specs) / 2)
        axes.axvline(1.0, color="#888c92", linewidth=1)
        axes.set_yticks(ticks, data)
        axes.set_title(_TITLES[measure], fontsize=10)
        axes.set_xlabel("× softmax", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.08)
        _plain(axes, "x")
    panels[0].invert_yaxis()
    _key(figure, specs, ["none"] + ["marker"] * (len(specs) - 1))
    figure.suptitle(
        "Distance of heads over softmax's; upper to lower mark: first to last layer. Hollow: "
        "before training",
        fontsize=10,
    )
    return figure


def _cost(
    rows: Sequence[Mapping[str, Any]], specs: Sequence[str], sizes: Sequence[Sequence[int]]
) -> Figure:
    """Draw operations, time and memory over the baseline's, against N and against D."""
    columns: list[tuple[str, Callable[[Mapping[str, Any]], Any]]] = [
        ("operations, model", lambda row: [row["model_ratio"]] * 3),
        ("time of a step", lambda row: row["time_ratio"]),
        ("peak memory", lambda row: row["memory_ratio"]),
    ]
    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    panels = figure.subplots(2, len(columns), sharey="col")
    # The curve with the most points at one D, or one N.
    dim = max({d for _, d in sizes}, key=lambda d: sum(other == d for _, other in sizes))
    length = max({n for n, _ in sizes}, key=lambda n: sum(other == n for other, _ in sizes))
    for line, (over, fixed, value) in enumerate(
        (("length", "dim", dim), ("dim", "length", length))
    ):
        for axes, (title, ratio) in zip(panels[line], columns, strict=True):
            for place, spec in enumerate(specs[1:], 1):
                curve = sorted(
                    (row[over], *ratio(row))
                    for row in rows
                    if row["spec"] == spec and row[fixed] == value and ratio(row)
                )
                at, middle, low, high = (
                    (list(x) for x in zip(*curve, strict=True)) if curve else ([], [], [], [])
                )
                errors = [
                    [m - a for m, a in zip(middle, low, strict=True)],
                    [b - m for m, b in zip(middle, high, strict=True)],
                ]
                axes.errorbar(
                    at,
                    middle,
                    yerr=errors,
                    fmt=f"{MARKERS[place % len(MARKERS)]}-",
                    color=COLOURS[place % len(COLOURS)],
                    markersize=5,
                    linewidth=1.2,
                    capsize=3,
                )
            axes.axhline(1.0, color="#888c92", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(sorted({s[line] for s in sizes})))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, place: f"{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(f"{'ND'[line]} ({'DN'[line]} = {value})", fontsize=9)
            axes.set_title(title, fontsize=10)
            _plain(axes, "y")
        panels[line][0].set_ylabel("× softmax", fontsize=9)
    for column, (_, ratio) in enumerate(columns):
        # By the figures: an interval may be so wide that nothing else would be seen.
        middles = [1.0, *(ratio(row)[0] for row in rows if ratio(row))]
        room = max(0.05, 0.5 * (max(middles) - min(middles)))
        panels[0][column].set_ylim(min(middles) - room, max(middles) + room)
    _key(figure, specs, ["none"] + ["line"] * (len(specs) - 1))
    return figure


def _key(figure: Figure, specs: Sequence[str], kinds: Sequence[str]) -> None:
    """Draw the legend below the panels."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D(
            [],
            [],
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle="-" if kind == "line" else "none",
            label=_short(spec),
            markersize=5,
        )
        for place, (spec, kind) in enumerate(zip(specs, kinds, strict=True))
        if kind != "none"
    ]
    figure.legend(
        handles=marks, loc="outside lower center", ncols=len(marks), fontsize=9, frameon=False
    )


def _short(spec: str) -> str:
    """Return a spec without the kernel, which all specs share."""
    return spec.removeprefix(f"{BASELINE}+")


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
