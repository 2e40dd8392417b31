"""Hooks, discovery and the inventory of backends, kernels and normalizations."""

from __future__ import annotations

from .hookspecs import hookimpl
from .inventory import list_backends, list_words, summary
from .registry import load_backend, register_backend, registered

__all__ = [
    "hookimpl",
    "list_backends",
    "list_words",
    "load_backend",
    "register_backend",
    "registered",
    "summary",
]
