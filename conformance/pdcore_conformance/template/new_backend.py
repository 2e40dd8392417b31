"""Create a plug-in from the template: an installable backend that passes the suite."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from pdcore import __version__
from pdcore.cli.files import OutputError
from pdcore.plugins import registry as plugins

from ..frameworks import framework
from ..frameworks.base import TRANSFORMATIONS

__all__ = ["new_backend"]

TEMPLATE = Path(__file__).parent

#: The distribution of a library, where its name differs from the import name.
_DISTRIBUTIONS = {"array_api_strict": "array-api-strict", "cupy": "cupy-cuda13x"}


def new_backend(name: str, folder: Path, *, library: str = "numpy") -> Path:
    """Write the project of a new backend.

    Parameters
    ----------
    name : str
        The name of the backend, an identifier that no other backend has.
    folder : Path
        The folder in which ``pdcore-NAME`` is created.
    library : str
        The import name of the array library.

    Returns
    -------
    Path
        The folder of the project.

    Raises
    ------
    ValueError
        When the name is not an identifier, or already in use.
    OutputError
        When the folder exists already, or cannot be created.
    ModuleNotFoundError
        When copier is not installed.
    """
    from copier import run_copy

    # What names a module, a distribution and a folder at once.
    if not re.fullmatch("[a-z]([a-z0-9_]{0,62}[a-z0-9])?", name) or keyword.iskeyword(name):
        raise ValueError(
            f"name: got {name!r}, expected at most 64 of a-z, 0-9 and _, a letter first and no _ "
            "last, such as mine"
        )
    if plugins.is_known(name):
        raise ValueError(f"name: there is a backend {name!r} already; choose another")
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", library) or keyword.iskeyword(library):
        raise ValueError(f"library: got {library!r}, expected an import name, such as numpy")
    project = folder / f"pdcore-{name.replace('_', '-')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = project.exists() and (not project.is_dir() or any(project.iterdir()))
    except OSError as error:
        raise OutputError(f"{project}: {error.strerror}") from error
    if taken:
        raise OutputError(f"{project} exists already: remove it, or choose another folder")
    transformations = framework(library).transformations
    lacks = [feature for feature in TRANSFORMATIONS if feature not in transformations]
    # `ArrayBackend` is differentiable in a library with autodiff; the rest must be tested first.
    lacks += [f for f in TRANSFORMATIONS if f not in lacks and f != "autodiff"]
    if library == "array_api_strict":
        lacks += ["float16", "bfloat16"]
    try:
        run_copy(
            str(TEMPLATE),
            project,
            defaults=True,
            quiet=True,
            overwrite=True,
            data={
                "name": name,
                "library": library,
                "lacks": lacks,
                "pdcore": __version__,
                "requirement": _DISTRIBUTIONS.get(library, library),
            },
        )
    except OSError as error:
        raise OutputError(f"{project}: {error}") from error
    return project
