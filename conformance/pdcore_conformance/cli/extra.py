"""What a command says where the extra ``conformance`` is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pdcore.cli.reporting import Failed
from pdcore.errors import Exit

__all__ = ["extra_needed"]


@contextmanager
def extra_needed(*packages: str) -> Iterator[None]:
    """End the command with what to install where the block misses one of these packages."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        raise Failed(
            Exit.MISSING, f"{package} is not installed: pip install 'pdcore[conformance]'"
        ) from error
