"""The array libraries that the suite runs on: what it needs of each, in one shape.

NumPy arrays go in and come out; a framework is imported when it is asked for, never before.
"""

from __future__ import annotations

import importlib
from functools import cache

from .base import Framework, Function, Memory

__all__ = ["Framework", "Function", "Memory", "framework"]

#: What is known about a library; any other gets `Framework` itself, by the array-API standard.
_OWN = {
    "numpy": "on_numpy:NumpyFramework",
    "array_api_strict": "on_numpy:StrictFramework",
    "torch": "on_torch:TorchFramework",
    "jax": "on_jax:JaxFramework",
    "cupy": "on_cupy:CupyFramework",
}


@cache
def framework(library: str) -> Framework:
    """Give the framework of an array library.

    Parameters
    ----------
    library : str
        Its import name, as in `pdcore.BackendInfo`.

    Returns
    -------
    Framework
        One for the process. The library itself is imported at its first use, so that
        `Framework.available` can say why it cannot be.
    """
    module, _, name = _OWN.get(library, "base:Framework").partition(":")
    kind: type[Framework] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return kind(library)
