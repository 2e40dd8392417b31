"""Maps of weights as images of one pixel for each weight."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

# Not pyplot, which keeps global state and may look for a display.
from matplotlib import colormaps
from matplotlib.image import imsave

__all__ = ["COLOURS", "png_uri"]

#: Colours of weights, 0 to 1; the square root spreads out the small ones.
COLOURS = "viridis"


def png_uri(weights: Any) -> str:
    """Return an array (N, M) in [0, 1] as the data URI of a PNG: blank for 0."""
    colours = colormaps[COLOURS](np.sqrt(np.clip(weights, 0.0, 1.0)))
    colours[weights == 0.0, 3] = 0.0
    stream = io.BytesIO()
    imsave(stream, colours, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
