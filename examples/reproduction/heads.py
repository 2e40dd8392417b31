"""Redundancy of heads: how far apart their attention maps and their outputs are."""

from __future__ import annotations

import statistics

import numpy as np
import torch

from pdcore_adapters.time_series.model import Classifier, layer_calls

from .protocol import MEASURES
from .training.series import Series

__all__ = ["distances"]


def distances(model: Classifier, series: Series, most: int) -> dict[str, list[float]]:
    """Measure the heads of every layer: the mean over pairs of heads, then over series.

    Parameters
    ----------
    model : Classifier
        The model, with two or more heads.
    series : Series
    most : int
        The largest number of series that are measured, evenly spread.

    Returns
    -------
    dict of str to list of float
        A figure for each layer, by `MEASURES`: the smaller, the more redundant.
    """
    count = len(series.labels)
    chosen = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    figures: dict[str, list[list[float]]] = {
        measure: [[] for _ in model.layers] for measure in MEASURES
    }
    for index in chosen:
        length = int(series.lengths[index])
        frames = torch.from_numpy(series.frames[index, :length])
        for place, call in enumerate(layer_calls(model, frames)):
            found = call.distances()
            for measure in MEASURES:
                figures[measure][place].append(float(getattr(found, measure)[0]))
    return {
        measure: [statistics.fmean(layer) for layer in layers]
        for measure, layers in figures.items()
    }
