"""What the heads of a layer do: their distances, their weights, pictures and a page.

`head_distance` and `head_distances` are functions of arrays of any library that pdcore takes.
`capture` records the calls of the attention layers of a model of PyTorch, transformers or Flax.
`plot_distances`, `plot_maps` and `write_page` need matplotlib, of the extra ``cli``. See
docs/diagnostics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .capturing import Capture, LayerCall, capture
from .distances import HeadDistances, head_distance, head_distances

if TYPE_CHECKING:
    from .page import write_page
    from .pictures import plot_distances, plot_maps

__all__ = [
    "Capture",
    "HeadDistances",
    "LayerCall",
    "capture",
    "head_distance",
    "head_distances",
    "plot_distances",
    "plot_maps",
    "write_page",
]


def __getattr__(name: str) -> Any:
    """Import what needs matplotlib at its first use."""
    from ..requirements import requires

    if name in ("plot_distances", "plot_maps", "write_page"):
        with requires("cli"):
            from . import page, pictures
        return getattr(page if name == "write_page" else pictures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
