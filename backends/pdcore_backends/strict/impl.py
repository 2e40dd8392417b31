"""Plans on array-api-strict, by `ArrayBackend` without any change.

array-api-strict implements the array-API standard and nothing else, so a plan that runs on it
needs nothing beyond the standard from any other library.
"""

from __future__ import annotations

from pdcore.extend import SilentBackend

from . import INFO

__all__ = ["StrictBackend"]


class StrictBackend(SilentBackend):
    """A backend that runs plans on array-api-strict arrays."""

    info = INFO
