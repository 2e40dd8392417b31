"""``pdcore new-backend``: a plugin to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pdcore.cli.reporting import Failed, emit, reported, stdout
from pdcore.errors import Exit

__all__ = ["new_backend"]


@reported
def new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backend's, such as mine.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the project goes.")
    ] = Path(),
    library: Annotated[
        str, typer.Option(help="The array library: numpy, torch, jax, cupy or any other.")
    ] = "numpy",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")
    ] = False,
) -> None:
    """Write an installable backend that conforms at once, with one step to make fast."""
    try:
        from ..template.new_backend import new_backend as write

        project = write(name, output, library=library)
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        if needed not in ("pdcore_conformance", "copier"):
            raise
        raise Failed(
            Exit.MISSING, f"{needed} is not installed: pip install 'pdcore[conformance]'"
        ) from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        emit({"project": str(project), "backend": name, "library": library})
        return
    stdout().print(
        escape(
            f"wrote {project}\n\n"
            f"    cd {project}\n"
            "    python -m pip install -e '.[test]'\n"
            f"    pdcore conform {name} --level core\n\n"
            f"then make pdcore_{name}/backend.py fast; its comments say in what order"
        ),
        soft_wrap=True,
    )
