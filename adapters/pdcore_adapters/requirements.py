"""What an adapter says where the library that it adapts is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["requires"]


@contextmanager
def requires(extra: str) -> Iterator[None]:
    """Name the extra to install where an import in the block finds no such package.

    Raises
    ------
    ModuleNotFoundError
        With the name of the missing module, as Python's own.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.startswith("pdcore"):
            raise  # a defect of ours, which no extra mends
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install 'pdcore[{extra}]'",
            name=error.name,
            path=error.path,
        ) from error
