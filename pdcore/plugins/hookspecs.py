"""The hooks of a plugin: what a module named by an entry point of the group ``pdcore`` may define.

A plugin decorates its functions with `hookimpl` and gives them the names below. Each is optional,
but a plugin without any is reported as broken, as is a misspelt name. ``docs/writing-a-backend.md``
is the guide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from ..backend import BackendInfo
    from ..spec import Kernel, Normalization

__all__ = ["hookimpl"]

_hookspec = pluggy.HookspecMarker("pdcore")

#: Marks a plugin's function as the implementation of the hook of its name.
hookimpl = pluggy.HookimplMarker("pdcore")


@_hookspec
def pdcore_backends() -> Sequence[BackendInfo]:  # type: ignore[empty-body]
    """Declare the plugin's backends; must not import the framework."""


@_hookspec
def pdcore_kernels() -> Sequence[type[Kernel]]:  # type: ignore[empty-body]
    """Give kernel classes, which join the grammar by their words."""


@_hookspec
def pdcore_normalizations() -> Sequence[type[Normalization]]:  # type: ignore[empty-body]
    """Give normalization classes, which join the grammar by their words."""


@_hookspec
def pdcore_known_failures(backend: str) -> Mapping[str, str]:  # type: ignore[empty-body]
    """Map conformance cases that a backend of this plugin fails to the reasons.

    Asked only for the plugin's own backends. An entry that passes, or that names no case, fails
    the conformance run, so the list cannot outlive its reasons.
    """
