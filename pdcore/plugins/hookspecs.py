"""Hook specifications: the functions that a plugin may define.

A plugin is a module named by an entry point of the group ``pdcore``. It defines functions of the
names below, decorated with `hookimpl`. Each hook is optional, but a plugin without any hook is
reported as broken, and so is a plugin with a misspelt hook. ``docs/writing-a-backend.md``
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
    """Return the declarations of the plugin's backends; must not import the framework."""


@_hookspec
def pdcore_kernels() -> Sequence[type[Kernel]]:  # type: ignore[empty-body]
    """Return kernel classes, which are added to the grammar by their words."""


@_hookspec
def pdcore_normalizations() -> Sequence[type[Normalization]]:  # type: ignore[empty-body]
    """Return normalization classes, which are added to the grammar by their words."""


@_hookspec
def pdcore_known_failures(backend: str) -> Mapping[str, str]:  # type: ignore[empty-body]
    """Return the conformance cases that a backend of this plugin fails, mapped to the reasons.

    Called only for backends of the same plugin. A listed case that passes, or that does not
    exist, fails the conformance run, so that entries are removed when their reason is gone.
    """
