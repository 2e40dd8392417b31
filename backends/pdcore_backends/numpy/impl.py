"""Plans on NumPy arrays."""

from __future__ import annotations

from pdcore.array_backend import ArrayBackend

from . import INFO

__all__ = ["NumpyBackend"]


class NumpyBackend(ArrayBackend):
    """Runs plans on NumPy arrays."""

    info = INFO
