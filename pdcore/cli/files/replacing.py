"""A result file that appears when it is complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import OutputError

__all__ = ["replacing"]

_O_BINARY = getattr(os, "O_BINARY", 0)  # Windows only


@contextlib.contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path`, renamed to `path` when the block ends well.

    When the block raises anything, an interrupt included, the temporary file is removed and
    `path` stays as it was.

    Parameters
    ----------
    path : Path
        The path of the result; a symbolic link is followed.
    force : bool
        Whether an existing file may be replaced.

    Raises
    ------
    OutputError
        When `path` exists and `force` is not set, is no regular file, or its folder does not take
        a new file. Raised before the block runs, and after it if another process created `path`
        meanwhile. Also when the block raises an `OSError`, such as that of a full disk.
    """

    def check() -> None:
        if target.exists() and not target.is_file():
            raise OutputError(f"{path}: exists and is not a regular file")
        if target.exists() and not force:
            raise OutputError(f"{path}: exists; --force replaces it")

    try:
        target = path.resolve()
        check()
    except OutputError:
        raise
    except (OSError, RuntimeError) as error:  # before Python 3.13 a loop is a RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: cannot write there: {reason}") from error
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        # Not `tempfile`: its files are for their owner only, and the result's mode should follow
        # the umask like any other file's.
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _O_BINARY, 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot write there: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        check()
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"{path}: cannot write it: {error.strerror or error}") from error
        raise
