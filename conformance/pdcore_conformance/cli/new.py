"""``pdcore new-backend``: a project with a backend that conforms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pdcore.cli.options import AsJson
from pdcore.cli.reporting import emit, reported, stdout

from .extra import extra_needed

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
    as_json: AsJson = False,
) -> None:
    """Write an installable backend that conforms at once, with one step to make fast."""
    try:
        with extra_needed("copier"):
            from ..template.new_backend import new_backend as write

            project = write(name, output, library=library)
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
