"""The reader of ``.safetensors`` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .checks import check_dtype_name, check_names, check_total
from .errors import FileError

__all__ = ["read_safetensors"]

Array = np.ndarray[Any, Any]

#: NumPy's names of the format's dtypes.
_DTYPES = {
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


def read_safetensors(path: Path, *, headers_only: bool = False) -> dict[str, Array]:
    """Return the arrays of a file by name, every name and dtype checked before any array.

    Parameters
    ----------
    path : Path
    headers_only : bool
        Whether to return zeros in place of the values; they take no memory.

    Raises
    ------
    FileError
        When the file is damaged, or an array has an unknown name or a wrong dtype.
    """
    try:
        import ml_dtypes  # noqa: F401 - adds bfloat16 to NumPy
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise FileError(f"{path}: needs {error.name}: pip install 'pdcore[cli]'") from error
    try:
        with safe_open(path, framework="numpy") as tensors:
            names = list(tensors.keys())
            check_names(path, names)
            zeros = {}
            for name in names:
                header = tensors.get_slice(name)
                stored = header.get_dtype()
                dtype = _DTYPES.get(stored, stored)
                check_dtype_name(path, name, dtype)
                zeros[name] = np.broadcast_to(np.zeros((), dtype), header.get_shape())
            if headers_only:
                return zeros
            check_total(path, path.stat().st_size)
            arrays = {name: tensors.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise FileError(f"{path}: not a readable .safetensors: {error}") from error
    # A byte other than 0 and 1 is no valid bool: compare instead of believing it.
    return {
        name: array.view(np.uint8) != 0 if array.dtype == bool else array
        for name, array in arrays.items()
    }
