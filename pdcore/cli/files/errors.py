"""The two ways in which a file of the command line fails."""

from __future__ import annotations

__all__ = ["FileError", "OutputError"]


class FileError(ValueError):
    """A file cannot be read, or does not hold the arrays of a call."""


class OutputError(OSError):
    """A result cannot be written to its path."""
