"""The JSON record of a run: its types, its writing and reading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdcore.moved import attribute as _attribute

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return _attribute(__name__, name)  # a name of 0.1
