"""Whose array is this: library, dtype and device by name, without importing a framework."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

__all__ = [
    "compiling",
    "device_name",
    "device_of",
    "dtype_name",
    "stop_gradient",
    "library_of",
    "register_array_type",
    "within",
]

_MODULES = sys.modules
# Import names of array libraries whose array types live in another top-level module.
_ROOTS = {"jaxlib": "jax"}
_LIBRARIES: dict[type, str] = {}
_DTYPES: dict[tuple[type, Any], str] = {}


def compiling() -> bool:
    """Whether the compiler of PyTorch traces this call; other compilers run it as it is."""
    torch = _MODULES.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def register_array_type(kind: type, library: str) -> None:
    """Note whose array a type is, for calls that are traced, which cannot find out."""
    _LIBRARIES[kind] = library


def library_of(x: Any, name: str) -> str:
    """Give the import name of the library that an array belongs to.

    Parameters
    ----------
    x : array
        An argument of the call.
    name : str
        The argument's name, for the error.

    Raises
    ------
    TypeError
        When `x` is no array, or one with a mask or matrix semantics of its own.
    """
    kind = type(x)
    library = _LIBRARIES.get(kind)
    if library is None:
        library = _library(x, kind, name)
        _LIBRARIES[kind] = library
    return library


def _library(x: Any, kind: type, name: str) -> str:
    if isinstance(x, (np.ma.MaskedArray, np.matrix)):
        raise TypeError(
            f"{name}: got {kind.__name__}, whose semantics would be lost; pass a plain "
            "numpy.ndarray (and masked keys as key_mask)"
        )
    roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
    roots = [_ROOTS.get(root, root) for root in roots if root != "builtins"]
    if not roots or not (hasattr(x, "shape") and hasattr(x, "dtype")) or isinstance(x, np.generic):
        raise TypeError(
            f"{name}: got {kind.__module__}.{kind.__qualname__}, expected an array of NumPy, "
            "PyTorch, JAX, CuPy or of a registered backend's library; convert it first, for "
            f"example by numpy.asarray({name})"
        )
    if kind is np.memmap:
        return "numpy"
    return roots[0]


def dtype_name(x: Any) -> str:
    """Give an array's dtype as ``"float32"``, ``"bfloat16"``, ``"bool"`` and so on."""
    dtype = x.dtype
    # With its type: dtypes of two libraries may have one hash, and comparing them may warn.
    key = (type(dtype), dtype)
    name = _DTYPES.get(key)
    if name is None:
        name = str(dtype).rpartition(".")[2]
        _DTYPES[key] = name
    return name


def stop_gradient(x: Any, xp: Any) -> Any:
    """Keep a framework's own differentiation out of a value that cancels in every result.

    What its gradient adds is 0 in exact arithmetic, and may be NaN in a program: where a compiler
    computes an array twice, rounded in two ways, no entry equals the maximum.
    """
    stop = getattr(xp, "stop_gradient", None)
    return x if stop is None else stop(x)


def constant(x: Any, xp: Any) -> Any:
    """Keep a framework's own differentiation out of what a formula says is held constant.

    Where a library has no way to differentiate by itself, the array as it is.
    """
    if hasattr(x, "detach"):
        return x.detach()
    if getattr(xp, "__name__", "") == "jax.numpy":
        return sys.modules["jax"].lax.stop_gradient(x)
    return stop_gradient(x, xp)


def within(x: Any, most: int, xp: Any) -> Any:
    """Keep an array of integers between 0 and `most`.

    A clip whose bounds are numbers waits for the device on CuPy.
    """
    return xp.minimum(xp.maximum(x, xp.zeros_like(x)), xp.full_like(x, most))


def device_of(x: Any) -> Any:
    """Give the device to make other arrays on: None, the default one, for JAX's tracers."""
    return getattr(x, "device", None)


def device_name(x: Any, library: str) -> str:
    """Give an array's device as ``"cpu"`` or ``"cuda:0"``."""
    if library == "numpy":
        return "cpu"
    if library == "jax":
        try:
            device = next(iter(x.devices()))
        except (AttributeError, TypeError):  # a tracer has none: it runs on the default device
            device = sys.modules["jax"].devices()[0]
        kind = "cuda" if device.platform == "gpu" else device.platform
        return "cpu" if kind == "cpu" else f"{kind}:{device.id}"
    device = x.device
    if library == "cupy":
        return f"cuda:{device.id}"
    text = str(device)
    return "cpu" if "CPU" in text else text
