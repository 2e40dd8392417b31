"""`plot_maps`, the weights of a layer, and `plot_distances`, the distances of heads by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Not pyplot, which keeps global state and may look for a display.
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from pdcore.extend import library_of

from .distances import HeadDistances
from .images import COLOURS

__all__ = ["as_maps", "plot_distances", "plot_maps"]

#: What the panels of `plot_distances` show.
_MEASURES = {
    "maps": "distance of weights",
    "outputs": "distance of outputs",
    "relative": "outputs over their norm",
}


def as_maps(weights: Any) -> Any:
    """Return the weights of one sequence as a NumPy array (H, N, M) of float64.

    Raises
    ------
    ValueError
        For another number of axes, as of a batch.
    """
    if len(weights.shape) != 3:
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}, expected those of one sequence, "
            "(H, N, M): take one of a batch, such as weights[0]"
        )
    library = library_of(weights, "weights")
    if library == "torch":
        weights = weights.detach().double().cpu()
    elif library == "cupy":
        weights = weights.get()
    return np.asarray(weights, dtype=np.float64)


def plot_maps(
    weights: Any,
    title: str = "",
    *,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
) -> Figure:
    """Draw the weights of a layer, a panel for each head.

    The colour scale is one for all heads and stands beside them: from 0 to the largest weight, by
    the square root. No weight at all is grey.

    Parameters
    ----------
    weights : array (H, N, M)
        Of one sequence, of any library.
    title : str
        Such as the name of the layer and its spec.
    queries, keys : sequence of str, optional
        The labels of the N queries and of the M keys, such as tokens.

    Returns
    -------
    matplotlib.figure.Figure
        For `savefig`; without the global state of pyplot.

    Raises
    ------
    ValueError
        For the weights of a batch, values that are negative or not finite, and labels of another
        number.
    """
    maps = as_maps(weights)
    _check_values(maps)
    heads, n, m = maps.shape
    for name, labels, count in (("queries", queries, n), ("keys", keys, m)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name}: got {len(labels)} labels, expected {count}")
    columns = min(heads, 4)
    lines = -(-heads // columns)
    size = 2.6 if queries is None and keys is None else 3.4
    figure = Figure(figsize=(size * columns + 1.0, size * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    norm = PowerNorm(0.5, 0.0, float(maps.max()) or 1.0)
    image: Any = None
    for head, ax in enumerate(axes.flat):
        if head >= heads:
            ax.set_visible(False)
            continue
        ax.set_facecolor("#d5d7da")
        seen = np.ma.masked_equal(maps[head], 0.0)
        image = ax.imshow(seen, cmap=COLOURS, norm=norm, aspect="auto", interpolation="nearest")
        ax.set_title(f"head {head + 1}", fontsize=9)
        ax.tick_params(labelsize=7)
        if keys is not None:
            ax.set_xticks(range(m), keys, rotation=90)
        if queries is not None:
            ax.set_yticks(range(n), queries)
    for ax in axes[:, 0]:
        ax.set_ylabel("query", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("key", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=24, pad=0.01)
    bar.set_label("weight, by its square root; grey: 0", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def _check_values(maps: Any) -> None:
    if not np.isfinite(maps).all() or maps.min(initial=0.0) < 0.0:
        raise ValueError(
            f"weights: got values from {maps.min():.3g} to {maps.max():.3g}, expected finite ones "
            "of 0 or more, which the colours stand for; see capture(...).weights"
        )


def plot_distances(distances: Mapping[str, HeadDistances], title: str = "") -> Figure:
    """Draw the distances of heads of each layer, a panel for each measure.

    A box spans the middle half of the sequences, with the median in it; whiskers reach the last
    sequence within 1.5 boxes, and those beyond are dots.

    Parameters
    ----------
    distances : mapping of str to HeadDistances
        By the name of the layer, such as ``{call.layer: call.distances()}``.
    title : str
        Such as the spec.

    Returns
    -------
    matplotlib.figure.Figure
        For `savefig`; without the global state of pyplot.

    Raises
    ------
    ValueError
        Without a layer.
    """
    if not distances:
        raise ValueError("distances: got no layer, expected one or more: see capture")
    figure = Figure(figsize=(9.0, 0.5 * len(distances) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(_MEASURES))
    for ax, (name, meaning) in zip(axes, _MEASURES.items(), strict=True):
        rows = [np.ravel(getattr(layer, name)) for layer in distances.values()]
        ax.boxplot(rows, orientation="horizontal")
        ax.set_xlim(left=0.0)
        labels = list(distances) if ax is axes[0] else [""] * len(rows)
        ax.set_yticks(range(1, len(rows) + 1), labels)
        ax.invert_yaxis()
        ax.set_title(f"{name}: {meaning}", fontsize=9)
        ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
