"""What an array file may hold, checked on its header, before any array is read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import nearest
from .errors import FileError

__all__ = ["check_dtype", "check_dtype_name", "check_names", "check_total", "listed"]

#: What a file may hold beside ``params.*``, each with the dtypes that it may have.
KNOWN = {
    "q": "float",
    "k": "float",
    "v": "float",
    "mask": "bool",
    "key_mask": "bool",
    "bias": "float",
    "offset": "int",
    **{f"{side}{name}": "int" for name in ("segments", "labels") for side in ("", "q_", "k_")},
}
_PARAM = re.compile(r"params\.[A-Za-z_]\w*\Z", re.ASCII)
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_names(path: Path, names: list[str]) -> None:
    """Raise `FileError` where an array has an unknown name, or two have the same."""
    for name in names:
        if name not in KNOWN and not _PARAM.match(name):
            raise FileError(
                f"{path}: unknown array {name!r}; {nearest(name, [*KNOWN, 'params.NAME'])}"
            )
    repeated = {name for name, count in Counter(names).items() if count > 1}
    if repeated:
        raise FileError(f"{path}: {listed(repeated)} is there twice")


def check_dtype(path: Path, name: str, dtype: Any) -> None:
    """Raise `FileError` where an array may not have this NumPy dtype."""
    if name == "offset" and dtype.kind == "U" and dtype.itemsize == 12:
        return  # three characters: "end", which `attention` checks
    hint = ""
    if dtype.kind == "V" and dtype.fields is None:
        hint = "; a .npz cannot hold bfloat16, use .safetensors"
    check_dtype_name(path, name, dtype.name, hint)


def check_dtype_name(path: Path, name: str, dtype: str, hint: str = "") -> None:
    """Raise `FileError` where an array may not have the dtype of this name."""
    kind = KNOWN.get(name, "float")
    expected = {"float": _FLOATS, "bool": ("bool",)}.get(kind)
    allowed = dtype in expected if expected else dtype.startswith(("int", "uint"))
    if not allowed:
        text = " (or the text 'end' in a .npz)" if name == "offset" else ""
        wanted = " or ".join(expected or (f"integers{text}",))
        raise FileError(f"{path}: {name} has dtype {dtype}, expected {wanted}{hint}")


def check_total(path: Path, nbytes: int) -> None:
    """Raise `FileError` where arrays of `nbytes` exceed this machine's memory."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    if nbytes > memory:
        raise FileError(
            f"{path}: its arrays take {nbytes / 2**30:.1f} GiB, and this machine has "
            f"{memory / 2**30:.1f} GiB of memory"
        )


def listed(names: Iterable[str]) -> str:
    """Return names, sorted and joined by commas; the first ten of many."""
    whole = sorted(names)
    more = f" and {len(whole) - 10} more" if len(whole) > 10 else ""
    return (", ".join(whole[:10]) or "nothing") + more
