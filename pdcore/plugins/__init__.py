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
    "BrokenPlugin",
    "broken",
    "candidates",
    "disabled",
    "discover",
    "generation",
    "hookimpl",
    "is_known",
    "known_failures",
    "list_backends",
    "list_words",
    "load_backend",
    "register_backend",
    "registered",
    "summary",
    "unavailable_reason",
    "unregister_backend",
]
