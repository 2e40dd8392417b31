"""The picture of a training: validation loss by epoch, and test accuracy by spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Not pyplot, which keeps global state and may look for a display.
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pdcore.cli.files import replacing

__all__ = ["write_png"]

# Told apart by readers who do not see all colours (Okabe and Ito), and in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def write_png(path: Path, result: Mapping[str, Any], title: str) -> Path:
    """Draw the validation loss of every run, a panel for each spec, and the test accuracies.

    Parameters
    ----------
    path : Path
        The path of the picture; an existing file is replaced.
    result : mapping
        The content of ``results.json``.
    title : str
        The data, for the title of the picture.

    Returns
    -------
    Path
        `path`.
    """
    specs = [row["spec"] for row in result["summary"]]
    columns = min(2, len(specs))
    rows = -(-len(specs) // columns)
    figure = Figure(figsize=(10.0, max(3.6, 1.2 + 2.0 * rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2), wspace=0.03)
    panels = left.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(panels.flat):
        if place < len(specs):
            _losses(axes, result, place, specs[place])
        else:
            axes.set_visible(False)
    left.supxlabel("epoch", fontsize=10)
    left.supylabel("validation loss", fontsize=10)
    left.suptitle("A line for each seed; the dot is the epoch chosen", fontsize=10)
    _accuracies(right.subplots(), result, specs)
    right.suptitle("Dots: seeds. Bar: mean ± standard deviation", fontsize=10)
    figure.suptitle(title, fontsize=11)
    with replacing(path, force=True) as stream:
        figure.savefig(stream, format="png", dpi=130)
    return path


def _losses(axes: Any, result: Mapping[str, Any], place: int, spec: str) -> None:
    colour = COLOURS[place % len(COLOURS)]
    for run in result["runs"]:
        losses = [epoch["loss"] for epoch in run["history"]]
        epochs = range(1, len(losses) + 1)
        if run["spec"] != spec:  # the other panels', to compare with
            axes.plot(epochs, losses, color="#d3d6da", linewidth=0.8, zorder=1)
            continue
        axes.plot(epochs, losses, color=colour, linewidth=1.2, zorder=2)
        axes.plot(
            run["epoch"],
            losses[run["epoch"] - 1],
            "o",
            color=colour,
            markersize=5.5,
            markeredgecolor="white",
            zorder=3,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, place: f"{loss:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
    axes.tick_params(labelleft=True, labelbottom=True)
    axes.set_title(spec, fontsize=10, color=colour)
    _plain(axes, "both")


def _accuracies(axes: Any, result: Mapping[str, Any], specs: list[str]) -> None:
    for place, row in enumerate(result["summary"]):
        colour = COLOURS[place % len(COLOURS)]
        each = [100 * run["test_accuracy"] for run in result["runs"] if run["spec"] == row["spec"]]
        axes.plot(
            each, [place] * len(each), "o", color=colour, markersize=6, alpha=0.5, markeredgewidth=0
        )
        mean, deviation = 100 * row["test_accuracy"], row["deviation"]
        spread = None if deviation is None else 100 * deviation
        axes.errorbar(
            mean,
            place,
            xerr=spread,
            fmt="|",
            color=colour,
            markersize=16,
            markeredgewidth=2,
            capsize=3,
        )
        text = f"{mean:.1f} %" if spread is None else f"{mean:.1f} ± {spread:.1f} %"
        axes.annotate(
            text, (mean, place), xytext=(0, 12), textcoords="offset points", ha="center", fontsize=9
        )
    # A long spec in two lines.
    axes.set_yticks(range(len(specs)), [spec.replace("+", "\n+", 1) for spec in specs])
    for label, colour in zip(axes.get_yticklabels(), COLOURS * len(specs), strict=False):
        label.set_color(colour)
    axes.set_ylim(len(specs) - 0.5, -0.6)
    axes.margins(x=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    axes.set_xlabel("test accuracy, %", fontsize=10)
    _plain(axes, "x")


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
