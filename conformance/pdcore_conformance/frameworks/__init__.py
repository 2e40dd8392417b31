"""The array libraries that the suite runs on, each behind the same interface.

The methods take and return NumPy arrays where they convert. A library is imported at its first use,
never before.
"""

from __future__ import annotations

import importlib
from functools import cache

from .base import Framework, Function, Memory

__all__ = ["Framework", "Function", "Memory", "framework"]

#: The class of a library; other libraries use `Framework`, which needs the array-API standard.
_CLASSES = {
    "numpy": "on_numpy:NumpyFramework",
    "array_api_strict": "on_numpy:StrictFramework",
    "torch": "on_torch:TorchFramework",
    "jax": "on_jax:JaxFramework",
    "cupy": "on_cupy:CupyFramework",
}


@cache
def framework(library: str) -> Framework:
    """Return the framework of an array library.

    Parameters
    ----------
    library : str
        The import name of the library, as in `pdcore.BackendInfo`.

    Returns
    -------
    Framework
        The same object for every call. The library is imported at its first use, so that
        `Framework.available` can return why the import fails.
    """
    module, _, name = _CLASSES.get(library, "base:Framework").partition(":")
    cls: type[Framework] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return cls(library)
