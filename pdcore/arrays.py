"""Library, dtype and device of an array by name, without importing a framework."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

__all__ = [
    "clip_integers",
    "compiling",
    "constant",
    "device_name",
    "device_of",
    "dtype_name",
    "stop_gradient",
    "library_of",
    "register_array_type",
    "untraced",
]

# Import names of array libraries whose array types live in another top-level module.
_ROOTS = {"jaxlib": "jax"}
_LIBRARIES: dict[type, str] = {}
_DTYPES: dict[tuple[type, Any], str] = {}


class _Loaded:
    """PyTorch's module, once another module has imported it."""

    torch: Any = None


_LOADED = _Loaded()


def _torch_is_loaded() -> bool:
    if _LOADED.torch is None:
        _LOADED.torch = sys.modules.get("torch")
    return _LOADED.torch is not None


# The compiler runs the function instead of tracing `sys.modules` with every module in it.
_torch_is_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compiling() -> bool:
    """Return whether PyTorch traces the running code, by its compiler, export or TorchScript."""
    if not _torch_is_loaded():
        return False
    torch = _LOADED.torch
    traced: bool = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced


def untraced() -> AbstractContextManager[None]:
    """Return a context that ``torch.jit.trace`` does not record: sizes are ints in it."""
    torch = _LOADED.torch
    return nullcontext() if torch.compiler.is_compiling() else _unrecorded(torch._C)


@contextmanager
def _unrecorded(native: Any) -> Iterator[None]:
    state = native._get_tracing_state()
    native._set_tracing_state(None)
    try:
        yield
    finally:
        native._set_tracing_state(state)


def register_array_type(kind: type, library: str) -> None:
    """Record the library of an array type, for traced code, which cannot look it up."""
    _LIBRARIES[kind] = library


def library_of(x: Any, name: str) -> str:
    """Return the import name of the library that an array belongs to.

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
        library = _find_library(x, kind, name)
        _LIBRARIES[kind] = library
    return library


def _find_library(x: Any, kind: type, name: str) -> str:
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
    """Return an array's dtype as ``"float32"``, ``"bfloat16"``, ``"bool"`` and so on."""
    dtype = x.dtype
    # The type is part of the key: dtypes of two libraries may hash alike, and comparing such
    # dtypes may warn.
    key = (type(dtype), dtype)
    name = _DTYPES.get(key)
    if name is None:
        name = str(dtype).rpartition(".")[2]
        _DTYPES[key] = name
    return name


def stop_gradient(x: Any, xp: Any) -> Any:
    """Stop the gradient through a value that cancels in the result, where `xp` offers it.

    The gradient through such a value is 0 in exact arithmetic, but may be NaN in a compiled
    program: if the compiler computes an array twice, rounded in two ways, no entry of the array
    equals its maximum. A namespace without ``stop_gradient`` returns `x` unchanged.
    """
    stop = getattr(xp, "stop_gradient", None)
    return x if stop is None else stop(x)


def constant(x: Any, xp: Any) -> Any:
    """Make an array a constant for automatic differentiation, in any library.

    Used where a formula says that a value is held constant. An array of a library without
    automatic differentiation is returned unchanged.
    """
    if hasattr(x, "detach"):
        return x.detach()
    if getattr(xp, "__name__", "") == "jax.numpy":
        return sys.modules["jax"].lax.stop_gradient(x)
    return stop_gradient(x, xp)


def clip_integers(x: Any, largest: int, xp: Any) -> Any:
    """Clip an array of integers to the range from 0 to `largest`.

    ``xp.clip`` with Python numbers as bounds would synchronize with the device on CuPy.
    """
    return xp.minimum(xp.maximum(x, xp.zeros_like(x)), xp.full_like(x, largest))


def device_of(x: Any) -> Any:
    """Return the device on which to create other arrays; None, the default, for JAX tracers."""
    return getattr(x, "device", None)


def device_name(x: Any, library: str) -> str:
    """Return an array's device as ``"cpu"`` or ``"cuda:0"``."""
    if library == "numpy":
        return "cpu"
    if library == "jax":
        try:
            device = next(iter(x.devices()))
        except (AttributeError, TypeError):  # a tracer has no device and runs on the default one
            device = sys.modules["jax"].devices()[0]
        kind = "cuda" if device.platform == "gpu" else device.platform
        return "cpu" if kind == "cpu" else f"{kind}:{device.id}"
    device = x.device
    if library == "cupy":
        return f"cuda:{device.id}"
    text = str(device)
    return "cpu" if "CPU" in text else text
