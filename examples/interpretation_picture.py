"""The picture of an attention layer as a regression."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Not pyplot, which keeps global state and may look for a display.
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pdcore.cli.files import replacing
from pdcore.svr import Interpretation

__all__ = ["write_png"]

BLUE, ORANGE = "#0072b2", "#d55e00"


def write_png(path: Path, interpretation: Interpretation, result: Mapping[str, Any]) -> Path:
    """Draw each head: its multipliers, its support vectors, and their number by epsilon.

    Parameters
    ----------
    path : Path
        The path of the picture; an existing file is replaced.
    interpretation : Interpretation
        The layer at the epsilon that is drawn.
    result : mapping
        The content of ``interpretation.json``.

    Returns
    -------
    Path
        `path`.
    """
    heads, frames = interpretation.support.shape
    figure = Figure(figsize=(2.8 * heads + 1.6, 8.4), layout="constrained")
    axes = figure.subplots(3, heads, squeeze=False, height_ratios=(3, 2, 2), sharey="row")
    for head in range(heads):
        _multipliers(axes[0, head], interpretation, head)
        _support(axes[1, head], interpretation, head)
        axes[1, head].sharex(axes[0, head])
        _counts(axes[2, head], result, head, frames)
    axes[0, 0].set_ylabel("output feature", fontsize=9)
    axes[1, 0].set_ylabel("share of the outputs\nthat need the frame", fontsize=9)
    axes[2, 0].set_ylabel("support frames", fontsize=9)
    bar = figure.colorbar(axes[0, 0].images[0], ax=axes[0, :], shrink=0.9, aspect=16, pad=0.01)
    bar.set_label("(α - α*) / C of the head", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(
        f"{result['spec']}, layer {result['layer']}: one utterance, speaker {result['speaker']}, "
        f"{frames} frames; ε = {result['share']:g} standard deviations of the outputs",
        fontsize=11,
    )
    with replacing(path, force=True) as stream:
        figure.savefig(stream, format="png", dpi=110)
    return path


def _multipliers(axes: Any, interpretation: Interpretation, head: int) -> None:
    box = interpretation.C[head]
    shown = interpretation.coefficients[head].T / (box or 1.0)
    axes.imshow(shown, cmap="RdBu_r", vmin=-1.0, vmax=1.0, aspect="auto", origin="lower")
    axes.set_title(f"head {head + 1}: the values need\nC = {box:.3g}", fontsize=9)
    axes.tick_params(labelsize=8, labelbottom=False)


def _support(axes: Any, interpretation: Interpretation, head: int) -> None:
    support, share = interpretation.support[head], interpretation.share[head]
    axes.bar(np.arange(len(share)), share, width=0.8, color=BLUE)
    none = np.flatnonzero(~support)
    axes.plot(none, np.full(len(none), 0.03), "x", color=ORANGE, markersize=4, clip_on=False)
    axes.set_ylim(0.0, 1.0)
    axes.set_title(
        f"{support.sum()} of {len(support)} frames are support\nvectors, error "
        f"{interpretation.error[head]:.2g} at the queries",
        fontsize=9,
    )
    axes.set_xlabel("key frame (×: not needed)", fontsize=9)
    _plain(axes)


def _counts(axes: Any, result: Mapping[str, Any], head: int, frames: int) -> None:
    shares = [float(share) for share in result["counts"]]
    counts = [by_head[head] for by_head in result["counts"].values()]
    axes.plot(shares, counts, "o-", color=BLUE, markersize=4, linewidth=1.2)
    axes.axvline(result["share"], color=ORANGE, linewidth=1.0)
    axes.set_xscale("log")
    axes.set_ylim(0, frames + 1)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("ε, standard deviations", fontsize=9)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
