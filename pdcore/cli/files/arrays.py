"""The arrays of a call, read from and written to a file of either format."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from .checks import listed
from .errors import FileError
from .npz import read_npz
from .safetensors_file import read_safetensors

__all__ = ["check_writable", "file_kind", "read_arrays", "write_arrays"]

Array = np.ndarray[Any, Any]

_KINDS = (".npz", ".safetensors")


def file_kind(path: Path) -> str:
    """Return the format that the extension of a path names.

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


def read_arrays(path: Path, *, headers_only: bool = False) -> dict[str, Any]:
    """Read the arrays of a call.

    Parameters
    ----------
    path : Path
        A ``.npz`` file, plain or compressed, or a ``.safetensors`` file, with ``q``, ``k`` and
        ``v``, and optionally ``mask``, ``key_mask``, ``bias``, ``offset``, ``segments`` (or
        ``q_segments`` and ``k_segments``), ``labels`` (likewise) and ``params.NAME``.
    headers_only : bool
        Whether to return zeros of the shapes and dtypes in the headers, which take no memory, in
        place of the values: a call can be checked before a compressed file is inflated.

    Returns
    -------
    dict
        Arrays by argument of `pdcore.attention`, in native byte order; ``offset`` an int where
        the file has a scalar (or ``"end"``, which a ``.npz`` may hold as text); ``params`` a dict
        of arrays; ``segments`` a pair where the file has ``q_segments`` and ``k_segments``, and
        ``labels`` likewise.

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
        read = read_npz if kind == ".npz" else read_safetensors
        arrays = read(path, headers_only=headers_only)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error
    for name in ("q", "k", "v"):
        if name not in arrays:
            raise FileError(f"{path}: {name} is missing; it holds {listed(arrays)}")
    call: dict[str, Any] = {n: a for n, a in arrays.items() if not n.startswith("params.")}
    call["params"] = {n.removeprefix("params."): a for n, a in arrays.items() if n not in call}
    for argument in ("segments", "labels"):
        pair = [call.pop(f"{side}_{argument}", None) for side in ("q", "k")]
        if any(x is not None for x in pair):
            if any(x is None for x in pair) or argument in call:
                raise FileError(
                    f"{path}: expected both q_{argument} and k_{argument}, or {argument} for "
                    f"queries and keys alike; it holds {listed(arrays)}"
                )
            call[argument] = tuple(pair)
    if "offset" in call and call["offset"].ndim == 0:
        call["offset"] = call["offset"].item()
    return call


def check_writable(path: Path, dtype: str) -> None:
    """Raise where the format of `path` cannot hold a result of this dtype.

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
        The file to write to.
    kind : {".npz", ".safetensors"}
        The format.
    arrays : mapping of str to array
        The arrays by name.
    metadata : mapping of str to str
        Texts that ``.safetensors`` keeps; a ``.npz`` has no place for them.
    """
    if kind == ".npz":
        np.savez(stream, allow_pickle=False, **arrays)
        return
    from safetensors.numpy import save

    # NumPy turns a scalar into one element on the way, so the shape is set again.
    contiguous = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    stream.write(save(contiguous, metadata=dict(metadata)))
