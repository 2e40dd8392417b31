"""The declaration of one backend with its owner, and how its class is loaded."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backend import Backend, BackendInfo
from ..errors import PluginError

if TYPE_CHECKING:
    from .discovery import Owner

__all__ = ["BrokenPlugin", "Entry", "instantiate", "is_importable"]


class BrokenPlugin(NamedTuple):
    """A plugin, or the class of a backend, that failed to load.

    Attributes
    ----------
    distribution, version : str
        The distribution that ships the plugin.
    error : BaseException
        The exception that the plugin raised, or a `PluginError` that describes its defect.
    """

    distribution: str
    version: str
    error: BaseException

    def __str__(self) -> str:
        name = "" if isinstance(self.error, PluginError) else f"{type(self.error).__name__}: "
        text = " ".join(str(self.error).split())
        return f"{name}{text} (distribution {self.distribution} {self.version})"


class Entry(NamedTuple):
    """A declared backend.

    Attributes
    ----------
    info : BackendInfo
        The declaration.
    owner : Owner or None
        The distribution that declares it; None for `register_backend` in this process.
    known_failures : callable or None
        The hook ``pdcore_known_failures`` of the plugin.
    """

    info: BackendInfo
    owner: Owner | None
    known_failures: Callable[[str], Any] | None = None

    @property
    def origin(self) -> str:
        """Where the backend is declared, as error messages say it."""
        return "register_backend in this process" if self.owner is None else str(self.owner)

    @property
    def rank(self) -> tuple[bool, int, str]:
        """The sort key of backends: built-in ones first, then by priority and name."""
        built_in = self.owner is not None and self.owner.built_in
        return (not built_in, -self.info.priority, self.info.name)

    def failure(self, error: BaseException) -> BrokenPlugin:
        """Return the record of a failure to load the backend."""
        distribution, version = self.owner[:2] if self.owner else ("(this process)", "")
        return BrokenPlugin(distribution, version, error)


def is_importable(name: str) -> bool:
    """Return whether a top-level module can be imported, without importing it."""
    if name in sys.modules:
        return sys.modules[name] is not None
    from importlib.util import find_spec

    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a failing finder, or a module without a spec
        return False


def instantiate(info: BackendInfo) -> Backend:
    """Import the class of a backend and create its instance.

    Raises
    ------
    PluginError
        When it is no subclass of `Backend`, or has another `info`.
    """
    path, _, attribute = info.load.partition(":")
    cls: Any = importlib.import_module(path)
    for part in attribute.split("."):
        cls = getattr(cls, part)
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise PluginError(f"{info.load} is {cls!r}, expected a subclass of pdcore.backend.Backend")
    backend = cls()
    # Selection reads the declared info, and `refusals` that of the class: they must be equal.
    if getattr(backend, "info", None) != info:
        raise PluginError(
            f"{info.load} has another `info` than what is declared for {info.name!r}: give both "
            "the same BackendInfo"
        )
    return backend
