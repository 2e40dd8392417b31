"""The reader of ``.npz`` files; nothing in such a file is believed or unpickled."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from .checks import check_dtype, check_names, check_total
from .errors import FileError

__all__ = ["read_npz"]

Array = np.ndarray[Any, Any]


class _Header(NamedTuple):
    """What the header of a member says, and where the array begins."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: Any
    start: int


# Deflate cannot expand a byte by more than this.
_DEFLATE_LIMIT = 1032
_CHUNK = 1 << 24


def read_npz(path: Path, *, headers_only: bool = False) -> dict[str, Array]:
    """Return the arrays of a file by name, each checked against the bytes that are there.

    Every header is checked before any array is inflated.

    Parameters
    ----------
    path : Path
    headers_only : bool
        Whether to return zeros in place of the values, of the shapes and dtypes of the headers;
        they take no memory.

    Raises
    ------
    FileError
        When the file is damaged, or an array has an unknown name or a wrong dtype.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [_member_name(path, info) for info in members]
            check_names(path, names)
            if sum(info.compress_size for info in members) > size:
                raise FileError(f"{path}: its members overlap or end after the file: damaged")
            check_total(path, sum(info.file_size for info in members))
            pairs = list(zip(names, members, strict=True))
            headers = [_read_header(path, archive, info, name) for name, info in pairs]
            if headers_only:
                return {
                    name: _without_values(header)
                    for name, header in zip(names, headers, strict=True)
                }
            return {
                name: _read_member(path, archive, info, name, header)
                for (name, info), header in zip(pairs, headers, strict=True)
            }
    except (FileError, OSError, MemoryError):
        raise
    except Exception as error:  # zipfile and zlib name no common base for damage
        reason = str(error) or type(error).__name__
        raise FileError(f"{path}: not a readable .npz: {reason}") from error


def _member_name(path: Path, info: zipfile.ZipInfo) -> str:
    """Return the array name of a member, after checks of its path, compression and size."""
    # `orig_filename` is what the file says; `filename` is cut at a NUL.
    raw = info.orig_filename
    if "/" in raw or "\\" in raw or "\0" in raw or ".." in raw:
        raise FileError(f"{path}: member {raw!r} is a path, expected names such as 'q.npy'")
    if not raw.endswith(".npy"):
        raise FileError(f"{path}: member {raw!r} is no array, expected names such as 'q.npy'")
    if info.flag_bits & 0x1:
        raise FileError(f"{path}: member {raw!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FileError(f"{path}: member {raw!r}: unknown compression {info.compress_type}")
    limit = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else _DEFLATE_LIMIT)
    if info.file_size > limit:
        raise FileError(
            f"{path}: member {raw!r} claims {info.file_size} bytes, but {info.compress_size} on "
            "disk cannot hold them: damaged"
        )
    return raw.removesuffix(".npy")


def _read_header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> _Header:
    """Return the header of a member, after checks of its dtype and size."""
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(path, name, stream)
        if dtype.hasobject:
            raise FileError(
                f"{path}: {name} is an array of Python objects, which would have to be unpickled; "
                "save it with a number dtype"
            )
        check_dtype(path, name, dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes != info.file_size - stream.tell():
            raise FileError(
                f"{path}: {name} claims shape {shape} {dtype}, {nbytes} bytes, but has "
                f"{info.file_size - stream.tell()}: damaged"
            )
        if dtype.kind == "U" and shape:
            raise FileError(f"{path}: offset is text, expected integers or the scalar 'end'")
        return _Header(shape, fortran, dtype, stream.tell())


def _without_values(header: _Header) -> Array:
    if header.dtype.kind == "U":
        return np.array("end")
    zero: Array = np.zeros((), header.dtype.newbyteorder("="))
    return np.broadcast_to(zero, header.shape)


def _read_member(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, header: _Header
) -> Array:
    shape, fortran, dtype, start = header
    with archive.open(info) as stream:
        stream.read(start)
        content = _read_bytes(path, name, stream, info.file_size - start)
    if dtype.kind == "U":
        if content.tobytes() != np.array("end", dtype=dtype).tobytes():
            raise FileError(f"{path}: offset is text, expected integers or the scalar 'end'")
        return np.array("end")
    # A byte other than 0 and 1 is no valid bool: compare instead of believing it.
    values: Array = content != 0 if dtype.kind == "b" else content.view(dtype)
    array = values.reshape(shape[::-1]).T if fortran else values.reshape(shape)
    # The same numbers; libraries want native byte order.
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _read_bytes(path: Path, name: str, stream: IO[bytes], nbytes: int) -> Array:
    """Read the rest of a member, as uint8, and compare its checksum."""
    content = np.empty(nbytes, dtype=np.uint8)
    filled = 0
    while filled < nbytes:
        chunk = stream.read(min(_CHUNK, nbytes - filled))
        if not chunk:
            raise FileError(f"{path}: {name} ends after {filled} of {nbytes} bytes: damaged")
        content[filled : filled + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
        filled += len(chunk)
    stream.read(1)  # zipfile compares the checksum at the end of the member
    return content


def _header(path: Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    """Return shape, order (True for Fortran's) and dtype from the header of a member."""
    form = np.lib.format
    try:
        version = form.read_magic(stream)
        # Version 3 exists for the field names of structured dtypes only.
        readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
        if version not in readers:
            raise FileError(f"{path}: {name} has .npy version {version}, expected 1.0 or 2.0")
        shape, fortran, dtype = readers[version](stream)
    except FileError:
        raise
    except Exception as error:  # a hostile header may raise anything from the parser
        raise FileError(f"{path}: {name} has no readable .npy header: {error}") from error
    if any(type(n) is not int or n < 0 for n in shape):
        raise FileError(f"{path}: {name} has shape {shape} in its header: damaged")
    return shape, fortran, dtype
