"""Plans on arrays of array-api-strict: the namespace, plus nothing."""

from __future__ import annotations

from pdcore.array_backend import ArrayBackend

from . import INFO

__all__ = ["ExampleBackend"]


class ExampleBackend(ArrayBackend):
    """Runs plans on arrays of array-api-strict."""

    info = INFO
