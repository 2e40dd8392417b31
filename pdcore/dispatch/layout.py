"""The layouts of q, k and v: the order of their axes, and the one transposition between layouts.

Behind `BoundAttention`, arrays are (*B, H, N, D) always: no backend knows of another layout.
"""

from __future__ import annotations

from typing import Any, Literal

from ..backend import LAYOUTS, Inputs, shape_in
from ..errors import nearest

__all__ = ["HEADS_FIRST", "Layout", "heads_first", "swap_axes", "swap_pullback"]

Layout = Literal["bhnd", "bnhd"]

HEADS_FIRST: Layout = "bhnd"


def heads_first(inputs: Inputs, layout: str) -> Inputs:
    """Return the inputs with q, k and v as (*B, H, N, D), by views where the library has them.

    Raises
    ------
    TypeError, ValueError
        When `layout` is none of `LAYOUTS`.
    """
    if not isinstance(layout, str):
        raise TypeError(f"layout: got {type(layout).__name__}, expected {_expected()}")
    if layout == HEADS_FIRST:
        return inputs
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout: got {layout!r}, expected {_expected()}; {nearest(layout, LAYOUTS)}"
        )
    q, k, v = inputs[:3]
    return inputs._replace(q=swap_axes(q), k=swap_axes(k), v=swap_axes(v))


def swap_axes(x: Any) -> Any:
    """Swap the axes of heads and length; leave alone what is no array of three or more axes."""
    if getattr(x, "ndim", 0) < 3:
        return x  # validation says what is wrong with it
    if hasattr(x, "swapaxes"):
        return x.swapaxes(-3, -2)
    from array_api_compat import array_namespace

    axes = shape_in("bnhd", tuple(range(x.ndim)))
    return array_namespace(x).permute_dims(x, axes)


def swap_pullback(pullback: Any) -> Any:
    """Return a pullback whose d_out and cotangents of q, k and v have swapped axes."""

    def pull(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
        cotangents = pullback(swap_axes(d_out), d_lse)
        return {n: swap_axes(x) if n in ("q", "k", "v") else x for n, x in cotangents.items()}

    return pull


def _expected() -> str:
    return " or ".join(f"{name!r} for {axes}" for name, axes in LAYOUTS.items())
