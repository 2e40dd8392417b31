"""The command ``pdcore demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdcore.cli.options import AsJson
from pdcore.cli.reporting import Failed, emit, note, reported, stdout
from pdcore.errors import Exit

__all__ = ["demo"]


@reported
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write the pictures.")
    ] = Path("pdcore-demo"),
    as_json: AsJson = False,
) -> None:
    """Run every preset on recorded vowels, on every backend, and draw the attention weights.

    Measures the error over its budget against the oracle, and the time, then writes a PNG and
    one self-contained HTML page.
    """
    from .running import run_demo
    from .table import show

    result = run_demo(out, say=note)
    if as_json:
        emit(result)
    else:
        show(result, stdout())
    if not result["within_budget"]:
        raise Failed(Exit.NUMERICS, "a backend's error exceeds its budget; see the table")
