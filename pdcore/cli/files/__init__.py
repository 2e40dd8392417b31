"""The arrays of a call in ``.npz`` and ``.safetensors`` files.

A file is taken as hostile until its header has been checked: nothing is unpickled, no size is
believed that the bytes on disk cannot hold, and no name leaves the file.
"""

from __future__ import annotations

from .arrays import check_writable, file_kind, read_arrays, write_arrays
from .errors import FileError, OutputError
from .replacing import replacing

__all__ = [
    "FileError",
    "OutputError",
    "check_writable",
    "file_kind",
    "read_arrays",
    "replacing",
    "write_arrays",
]
