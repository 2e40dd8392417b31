"""Plans on array-api-strict: exactly what `ArrayBackend` gives.

The library has nothing but the standard, so what runs here needs nothing else of any other.
"""

from __future__ import annotations

from pdcore.extend import SilentBackend

from . import INFO

__all__ = ["StrictBackend"]


class StrictBackend(SilentBackend):
    """Runs plans on array-api-strict arrays."""

    info = INFO
