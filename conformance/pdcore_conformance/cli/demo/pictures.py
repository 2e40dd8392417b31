"""The picture of the demo: attention weights, head by head, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Not pyplot, which keeps global state and may look for a display.
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from pdcore.cli.files import replacing
from pdcore_adapters.diagnostics.images import COLOURS

__all__ = ["write_png"]

Array = np.ndarray[Any, Any]


def write_png(path: Path, weights: Mapping[str, Array], result: Mapping[str, Any]) -> Path:
    """Draw the weights of one utterance, a column for each preset and a row for each head.

    Parameters
    ----------
    path : Path
        The path of the picture.
    weights : mapping of str to array (H, N, N)
        The weights by spec.
    result : mapping
        The measurements of `pdcore_conformance.cli.demo.running.run_demo`.

    Returns
    -------
    Path
        `path`.
    """
    heads = next(iter(weights.values())).shape[0]
    figure = Figure(figsize=(2.0 * len(weights) + 0.9, 2.0 * heads + 1.5), layout="constrained")
    axes = figure.subplots(heads, len(weights), squeeze=False, sharex=True, sharey=True)
    for column, preset in enumerate(result["presets"]):
        shown = weights[preset["spec"]]
        for row in range(heads):
            ax = axes[row, column]
            ax.set_facecolor("#d5d7da")
            seen = np.ma.masked_equal(shown[row], 0.0)
            ax.imshow(seen, cmap=COLOURS, norm=PowerNorm(0.5, 0.0, 1.0))
            ax.set_xticks([0, 10, 20])
            ax.set_yticks([0, 10, 20])
            ax.tick_params(labelsize=8)
        title = preset["spec"].replace("+", " +\n", 1)
        axes[0, column].set_title(title, fontsize=9)
        distance = preset["redundancy"]["utterance"]
        axes[-1, column].set_xlabel(f"key frame\nhead distance {distance:.2f}", fontsize=9)
    for row in range(heads):
        axes[row, 0].set_ylabel(f"head {row + 1}\nquery frame", fontsize=9)
    bar = figure.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.5, aspect=30, pad=0.01)
    bar.set_label("attention weight (grey: none)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    utterance = result["utterance"]
    figure.suptitle(
        f"Attention weights of one utterance (speaker {utterance['speaker']}, "
        f"{utterance['frames']} frames), untrained projections",
        fontsize=11,
    )
    with replacing(path, force=True) as stream:
        figure.savefig(stream, format="png", dpi=110)
    return path
