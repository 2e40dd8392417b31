"""Hooks, discovery and the inventory of backends, kernels and normalizations."""

from __future__ import annotations

from .hookspecs import hookimpl
from .inventory import list_backends, list_words, summary
from .registry import (
    BrokenPlugin,
    broken,
    candidates,
    disabled,
    discover,
    generation,
    is_known,
    known_failures,
    load_backend,
    register_backend,
    registered,
    unavailable_reason,
    unregister_backend,
)

__all__ = [
    # plug-ins
    "hookimpl",
    "discover",
    "generation",
    "BrokenPlugin",
    "broken",
    "disabled",
    # backends
    "register_backend",
    "unregister_backend",
    "registered",
    "is_known",
    "candidates",
    "load_backend",
    "unavailable_reason",
    "known_failures",
    # inventory
    "list_backends",
    "list_words",
    "summary",
]
