"""The planted defects by name, each with the case of the suite that must fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pdcore import register_backend
from pdcore.backend import FEATURES, ArrayBackend, BackendInfo

__all__ = ["MUTANTS", "PARENT", "Mutant", "planted", "register"]

_FRAMEWORK = {"autodiff", "double_backward", "vmap", "jvp", "compile", "axis_name", "group"}
FULL: Mapping[str, Any] = {f: "unsupported" if f in _FRAMEWORK else "full" for f in FEATURES}
#: The backend without a defect, on which all of these cases must pass.
PARENT = "unmutated"


class Mutant(NamedTuple):
    """A planted defect.

    Attributes
    ----------
    cls : type
        The class of the backend.
    case : str
        The id of the case that must fail, whose name describes the defect.
    """

    cls: type[ArrayBackend]
    case: str


MUTANTS: dict[str, Mutant] = {}


def _info(name: str, cls: str, module: str, **capabilities: Any) -> BackendInfo:
    return BackendInfo(
        name=name,
        load=f"{module}:{cls}",
        library="numpy",
        requires=("numpy",),
        capabilities={**FULL, **capabilities},
    )


def planted(case: str, **capabilities: Any) -> Callable[[type[Any]], type[Any]]:
    """Return a decorator that registers a class as a mutant, with the case that must fail."""

    def add(cls: type[Any]) -> type[Any]:
        words = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).strip("_")
        cls.info = _info(f"mutant_{words}", cls.__name__, cls.__module__, **capabilities)
        MUTANTS[words] = Mutant(cls, case)
        return cls

    return add


class Unmutated(ArrayBackend):
    """`ArrayBackend` on NumPy."""

    info = _info(PARENT, "Unmutated", __name__)


def register() -> None:
    """Register the mutants and the backend without a defect in this process."""
    from . import (  # noqa: F401 - their import fills MUTANTS
        backward,
        behaviour,
        blocks,
        calls,
        dropout,
        forward,
        positions,
        shapes,
        sinks,
        statistics,
    )

    for cls in (Unmutated, *(mutant.cls for mutant in MUTANTS.values())):
        register_backend(cls.info)
