"""The arrays of a call in ``.npz`` and ``.safetensors`` files.

A file is taken as hostile until its header has been checked: nothing is unpickled, no size is
believed that the bytes on disk cannot hold, and no name leaves the file.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import nearest

__all__ = ["FileError", "OutputError", "file_kind", "read_arrays", "replacing", "write_arrays"]

Array = np.ndarray[Any, Any]

#: What a file may hold beside ``params.*``, each with the dtypes that it may have.
KNOWN = {
    "q": "float",
    "k": "float",
    "v": "float",
    "mask": "bool",
    "key_mask": "bool",
    "bias": "float",
    "offset": "int",
}
_PARAM = re.compile(r"params\.[A-Za-z_]\w*\Z", re.ASCII)
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_KINDS = (".npz", ".safetensors")

# Deflate cannot expand a byte by more than this.
_DEFLATE_LIMIT = 1032
_CHUNK = 1 << 24


class FileError(ValueError):
    """A file cannot be read, or does not hold the arrays of a call."""


class OutputError(OSError):
    """A result cannot be written where it should go."""


def file_kind(path: Path) -> str:
    """Tell the format by the extension.

    Returns
    -------
    {".npz", ".safetensors"}

    Raises
    ------
    FileError
        On any other extension.
    """
    kind = path.suffix.lower()
    if kind not in _KINDS:
        raise FileError(f"{path}: extension {path.suffix!r}, expected one of {', '.join(_KINDS)}")
    return kind


def read_arrays(path: Path) -> dict[str, Any]:
    """Read the arrays of a call.

    Parameters
    ----------
    path : Path
        A ``.npz`` file, plain or compressed, or a ``.safetensors`` file, with ``q``, ``k`` and
        ``v``, and optionally ``mask``, ``key_mask``, ``bias``, ``offset`` and ``params.NAME``.

    Returns
    -------
    dict
        Arrays by argument of `pdcore.attention`, in native byte order; ``offset`` an int where
        the file has a scalar (or ``"end"``, which a ``.npz`` may hold as text); ``params`` a dict
        of arrays.

    Raises
    ------
    FileError
        When the file is missing, damaged, too large for this machine, or holds objects, unknown
        names or wrong dtypes, or lacks q, k or v. The message names the file and the array.
    """
    kind = file_kind(path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise FileError(f"{path}: not a regular file")
    try:
        found = _read_npz(path) if kind == ".npz" else _read_safetensors(path)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error
    for name in ("q", "k", "v"):
        if name not in found:
            raise FileError(f"{path}: {name} is missing; it holds {_listed(found)}")
    call: dict[str, Any] = {n: a for n, a in found.items() if not n.startswith("params.")}
    call["params"] = {n.removeprefix("params."): a for n, a in found.items() if n not in call}
    if "offset" in call and call["offset"].ndim == 0:
        call["offset"] = call["offset"].item()
    return call


def _read_npz(path: Path) -> dict[str, Array]:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [_member_name(path, info) for info in members]
            _check_names(path, names)
            if sum(info.compress_size for info in members) > size:
                raise FileError(f"{path}: its members overlap or end after the file: damaged")
            _check_total(path, sum(info.file_size for info in members))
            return {
                name: _read_member(path, archive, info, name)
                for name, info in zip(names, members, strict=True)
            }
    except (FileError, OSError, MemoryError):
        raise
    except Exception as error:  # zipfile and zlib name no common base for damage
        reason = str(error) or type(error).__name__
        raise FileError(f"{path}: not a readable .npz: {reason}") from error


def _member_name(path: Path, info: zipfile.ZipInfo) -> str:
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


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Array:
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(path, name, stream)
        if dtype.hasobject:
            raise FileError(
                f"{path}: {name} is an array of Python objects, which would have to be unpickled; "
                "save it with a number dtype"
            )
        _check_dtype(path, name, dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes != info.file_size - stream.tell():
            raise FileError(
                f"{path}: {name} claims shape {shape} {dtype}, {nbytes} bytes, but has "
                f"{info.file_size - stream.tell()}: damaged"
            )
        flat = np.empty(nbytes, dtype=np.uint8)
        filled = 0
        while filled < nbytes:
            chunk = stream.read(min(_CHUNK, nbytes - filled))
            if not chunk:
                raise FileError(f"{path}: {name} ends after {filled} of {nbytes} bytes: damaged")
            flat[filled : filled + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
            filled += len(chunk)
        stream.read(1)  # the checksum is compared at the end of the member
    if dtype.kind == "U":
        if shape or flat.tobytes() != np.array("end", dtype=dtype).tobytes():
            raise FileError(f"{path}: offset is text, expected integers or the scalar 'end'")
        return np.array("end")
    # A byte other than 0 and 1 is no valid bool: compare instead of believing it.
    values: Array = flat != 0 if dtype.kind == "b" else flat.view(dtype)
    array = values.reshape(shape[::-1]).T if fortran else values.reshape(shape)
    # The same numbers; libraries want native byte order.
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _header(path: Path, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
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


def _read_safetensors(path: Path) -> dict[str, Array]:
    try:
        import ml_dtypes  # noqa: F401 - gives NumPy bfloat16
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise FileError(f"{path}: needs {error.name}: pip install 'pdcore[cli]'") from error
    try:
        with safe_open(path, framework="numpy") as tensors:
            names = list(tensors.keys())
            _check_names(path, names)
            dtypes = {
                "F16": "float16",
                "BF16": "bfloat16",
                "F32": "float32",
                "F64": "float64",
                "BOOL": "bool",
                "I8": "int8",
                "I16": "int16",
                "I32": "int32",
                "I64": "int64",
                "U8": "uint8",
                "U16": "uint16",
                "U32": "uint32",
                "U64": "uint64",
            }
            for name in names:
                stored = tensors.get_slice(name).get_dtype()
                _check_dtype_name(path, name, dtypes.get(stored, stored))
            _check_total(path, path.stat().st_size)
            found = {name: tensors.get_tensor(name) for name in names}
            return {
                name: array.view(np.uint8) != 0 if array.dtype == bool else array
                for name, array in found.items()
            }
    except SafetensorError as error:
        raise FileError(f"{path}: not a readable .safetensors: {error}") from error


def _check_names(path: Path, names: list[str]) -> None:
    for name in names:
        if name not in KNOWN and not _PARAM.match(name):
            raise FileError(
                f"{path}: unknown array {name!r}; {nearest(name, [*KNOWN, 'params.NAME'])}"
            )
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise FileError(f"{path}: {_listed(twice)} is there twice")


def _check_dtype(path: Path, name: str, dtype: Any) -> None:
    if name == "offset" and dtype.kind == "U" and dtype.itemsize == 12:
        return  # three characters: "end", which `attention` checks
    hint = ""
    if dtype.kind == "V" and dtype.fields is None:
        hint = "; a .npz cannot hold bfloat16, use .safetensors"
    _check_dtype_name(path, name, dtype.name, hint)


def _check_dtype_name(path: Path, name: str, dtype: str, hint: str = "") -> None:
    kind = KNOWN.get(name, "float")
    expected = {"float": _FLOATS, "bool": ("bool",)}.get(kind)
    good = dtype in expected if expected else dtype.startswith(("int", "uint"))
    if not good:
        wanted = " or ".join(expected or ("integers (or the text 'end' in a .npz)",))
        raise FileError(f"{path}: {name} has dtype {dtype}, expected {wanted}{hint}")


def _check_total(path: Path, nbytes: int) -> None:
    """Refuse what cannot fit in this machine's memory, before any of it is allocated."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    if nbytes > memory:
        raise FileError(
            f"{path}: its arrays take {nbytes / 2**30:.1f} GiB, and this machine has "
            f"{memory / 2**30:.1f} GiB of memory"
        )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"


@contextlib.contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its name when the block ends well.

    When the block raises anything, an interrupt included, the temporary file is removed and
    `path` stays as it was.

    Parameters
    ----------
    path : Path
        Where the result goes; a symbolic link is followed.
    force : bool
        Whether an existing file may be replaced.

    Raises
    ------
    OutputError
        When `path` exists and `force` is not set, is no regular file, or its folder does not take
        a new file. Raised before the block runs, and again after it if somebody else made `path`
        meanwhile.
    """
    target = path.resolve()

    def check() -> None:
        if target.exists() and not target.is_file():
            raise OutputError(f"{path}: exists and is not a regular file")
        if target.exists() and not force:
            raise OutputError(f"{path}: exists; --force replaces it")

    check()
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


_O_BINARY = getattr(os, "O_BINARY", 0)  # Windows only


def check_writable(path: Path, dtype: str) -> None:
    """Refuse a result that the format of `path` cannot hold.

    Raises
    ------
    FileError
        On an unknown extension, and on bfloat16 in a ``.npz``.
    """
    if file_kind(path) == ".npz" and dtype == "bfloat16":
        raise FileError(f"{path}: a .npz cannot hold bfloat16, use .safetensors")


def write_arrays(
    stream: IO[bytes],
    kind: str,
    arrays: Mapping[str, Array],
    metadata: Mapping[str, str],
) -> None:
    """Write named arrays.

    Parameters
    ----------
    stream : binary file
        Where to.
    kind : {".npz", ".safetensors"}
        The format.
    arrays : mapping of str to array
        What to write.
    metadata : mapping of str to str
        Kept by ``.safetensors``; a ``.npz`` has no place for it.
    """
    if kind == ".npz":
        np.savez(stream, allow_pickle=False, **arrays)
        return
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    stream.write(save(contiguous, metadata=dict(metadata)))
