"""``pdcore derive``: from a layer to its attention."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ..derivation import LAYERS
from ..derivation import derive as compute_derivation
from .options import AsJson
from .reporting import emit, reported, stdout

__all__ = ["derive"]


@reported
def derive(
    layer: Annotated[
        str,
        typer.Argument(
            metavar="LAYER",
            help=f"One of {', '.join(LAYERS)}, with arguments as in 'mixture_norm(components=3)'.",
        ),
    ],
    kernel: Annotated[
        str, typer.Option(help="A kernel, such as exponential or 'gaussian(0.3)'.")
    ] = "exponential",
    dim: Annotated[int, typer.Option(help="D, which the plan is for.", min=1)] = 64,
    latex: Annotated[bool, typer.Option("--latex", help="Print the steps as LaTeX.")] = False,
    as_json: AsJson = False,
) -> None:
    """Derive an attention from a layer of a neural network, step by step."""
    derivation = compute_derivation(layer, kernel, dim=dim)
    if as_json:
        emit(derivation.to_dict())
        return
    stdout().print(escape(derivation.latex() if latex else str(derivation)), soft_wrap=True)
