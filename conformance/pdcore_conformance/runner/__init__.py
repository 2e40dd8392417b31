"""Run the suite on a backend, and count its outcomes.

`conform` and `list_cases` import pytest and the judge when they are first asked for; this package
itself imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conforming import SuiteResult, conform, list_cases

__all__ = ["SuiteResult", "conform", "list_cases"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import conforming

    return getattr(conforming, name)
