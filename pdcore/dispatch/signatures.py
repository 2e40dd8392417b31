"""What dispatch reads of an argument: everything but values, for the keys of its caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["offset_kind", "signature"]


def offset_kind(offset: Any) -> str:
    """Return the kind of an offset, see `Request.offset`."""
    if isinstance(offset, str):
        return "end"
    if not hasattr(offset, "shape") or isinstance(offset, np.integer):
        return "int"
    return "sequence" if len(offset.shape) else "array"


def signature(x: Any) -> Any:
    """Return everything that validation reads of an argument, hashable and without values."""
    kind = type(x)
    if kind is np.ndarray:  # the most frequent case first
        return kind, x.shape, x.dtype
    if x is None or kind is int:
        return kind
    if kind is str or kind is float:
        return x
    if kind is tuple or kind is list:  # segments
        return kind, *map(signature, x)
    if not hasattr(x, "shape") and isinstance(x, Mapping):
        return tuple((name, *signature(value)) for name, value in x.items())
    if not hasattr(x, "shape") and callable(getattr(x, "size", None)):  # a group of processes
        return kind, x.size()
    return kind, x.shape, x.dtype, x.device, getattr(x, "layout", None)
