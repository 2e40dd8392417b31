"""A new plugin from the template: an installable backend that is green at once."""

from __future__ import annotations

import keyword
from pathlib import Path

from pdcore import __version__
from pdcore.cli.files import OutputError
from pdcore.plugins import registry as plugins

from ..frameworks import framework
from ..frameworks.base import TRANSFORMATIONS

__all__ = ["new_backend"]

TEMPLATE = Path(__file__).parent

#: The distribution that brings a library, where it has another name.
_DISTRIBUTIONS = {"array_api_strict": "array-api-strict", "cupy": "cupy-cuda13x"}


def new_backend(name: str, folder: Path, *, library: str = "numpy") -> Path:
    """Write a project.

    Parameters
    ----------
    name : str
        The backend's, an identifier that no backend has.
    folder : Path
        Where the project's own folder, ``pdcore-NAME``, is to be.
    library : str
        The import name of the array library.

    Returns
    -------
    Path
        The project.

    Raises
    ------
    ValueError
        For a name that cannot be one, or is taken.
    OutputError
        When the folder is there already, or cannot be made.
    ModuleNotFoundError
        Without copier.
    """
    from copier import run_copy

    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ValueError(f"name: got {name!r}, expected an identifier in lower case, such as mine")
    if plugins.is_known(name):
        raise ValueError(f"name: there is a backend {name!r} already; choose another")
    if not library.isidentifier():
        raise ValueError(f"library: got {library!r}, expected an import name, such as numpy")
    project = folder / f"pdcore-{name.replace('_', '-')}"
    if project.exists() and (not project.is_dir() or any(project.iterdir())):
        raise OutputError(f"{project} exists already: remove it, or choose another folder")
    known = framework(library)
    lacks = [feature for feature in TRANSFORMATIONS if feature not in known.transformations]
    # That autodiff goes through is the library's merit; the rest has to be tried first.
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
