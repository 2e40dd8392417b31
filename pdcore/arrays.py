"""Library, dtype and device of an array by name, without importing a framework."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

__all__ = [
    "check_form",
    "clip_integers",
    "compiling",
    "constant",
    "device_name",
    "device_of",
    "dtype_name",
    "exchangeable",
    "host_values",
    "stop_gradient",
    "library_of",
    "overflow_as_nan",
    "register_array_type",
    "untraced",
]

# Import names of array libraries whose array types live in another top-level module.
_ROOTS = {"jaxlib": "jax"}
# The libraries with built-in backends, and the name of the base class of their arrays.
_ARRAYS = {"numpy": "ndarray", "torch": "Tensor", "jax": "Array", "cupy": "ndarray"}
_LIBRARIES: dict[type, str] = {}
_DTYPES: dict[tuple[type, Any], str] = {}


class _Loaded:
    """PyTorch's module, once another module has imported it."""

    torch: Any = None


_LOADED = _Loaded()


def _torch_is_loaded() -> bool:
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
        if compiling() and isinstance(x, _LOADED.torch.Tensor):
            return "torch"
        library = _find_library(x, kind, name)
        _LIBRARIES[kind] = library
    return library


def _find_library(x: Any, kind: type, name: str) -> str:
    if isinstance(x, np.ndarray) and kind not in (np.ndarray, np.memmap):
        raise TypeError(
            f"{name}: got {kind.__name__}, whose semantics would be lost; pass a plain "
            f"numpy.ndarray, such as numpy.asarray({name}) (and masked keys as key_mask)"
        )
    for library, array in _ARRAYS.items():
        known = getattr(sys.modules.get(library), array, None)
        if known is not None and isinstance(x, known):
            return library
    roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
    roots = [_ROOTS.get(root, root) for root in roots if root != "builtins"]
    if not roots or not (hasattr(x, "shape") and hasattr(x, "dtype")) or isinstance(x, np.generic):
        raise TypeError(_no_array(x, name))
    return roots[0]


def _no_array(x: Any, name: str) -> str:
    """Return the message for an argument that is no array of a known library."""
    kind = type(x)
    attributes = ("to_dense()", "full_tensor()", "compute()", "value")
    ways = [f"{name}.{a}" for a in attributes if hasattr(kind, a.removesuffix("()"))]
    return (
        f"{name}: got {kind.__module__}.{kind.__qualname__}, expected an array of NumPy, "
        "PyTorch, JAX, CuPy or of a registered backend's library; convert it first, for "
        f"example by {ways[0] if ways else f'numpy.asarray({name})'}"
    )


def check_form(x: Any, name: str, library: str, taken: Callable[[], Container[str]]) -> None:
    """Check that an array holds its values in the plain form that backends read.

    Parameters
    ----------
    x : array
        An argument of the call.
    name : str
        The argument's name, for the error.
    library : str
        The library of `x`.
    taken : callable
        Returns the libraries whose arrays some backend takes.

    Raises
    ------
    TypeError
        For a nested, sparse, quantized or distributed tensor, one without values, and an array of
        a library that no backend takes; the message says how to convert it.
    """
    if compiling():
        return  # a form of tensors that the compiler cannot trace is its own error
    if library in _ARRAYS:
        found = _torch_form(x) if library == "torch" else None
        if found is not None:
            raise TypeError(
                f"{name}: got {found[0]}, expected a dense tensor; pass {found[1](name)}"
            )
    elif library not in taken():
        raise TypeError(_no_array(x, name) + f"; no backend takes arrays of {library}")


def _torch_form(x: Any) -> tuple[str, Callable[[str], str]] | None:
    """Return the form of a tensor that is not dense, and how it is made dense."""
    if getattr(x, "is_nested", False):
        return "a nested tensor", lambda n: f"{n}.to_padded_tensor(0.0), and key_mask for padding"
    if (layout := str(getattr(x, "layout", "torch.strided"))) != "torch.strided":
        return f"a tensor of layout {layout}", "{}.to_dense()".format
    if getattr(x, "is_quantized", False):
        return "a quantized tensor", "{}.dequantize()".format
    if hasattr(type(x), "full_tensor"):
        return f"a {type(x).__name__}", "{0}.full_tensor() or {0}.to_local()".format
    if getattr(x, "is_meta", False):
        return (
            "a tensor on the device meta, which has no values",
            lambda n: f"a tensor of torch's FakeTensorMode as {n} to infer shapes",
        )
    return None


def exchangeable(x: Any, library: str) -> Any:
    """Return an array of the same values whose memory DLPack can describe: `x` itself, or a copy.

    DLPack states no read-only memory, no negative strides (PyTorch aborts the process) and no
    negation that PyTorch still has to apply.
    """
    if library == "numpy":
        strides = all(step >= 0 and step % x.itemsize == 0 for step in x.strides)
        return x if strides and x.flags.writeable and x.flags.aligned else np.array(x)
    if library == "torch":
        return x.resolve_neg()
    return x


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


def host_values(x: Any) -> Any:
    """Return the values of an array as one of NumPy; None where a compiler or a map traces it."""
    if isinstance(x, np.ndarray):
        return x
    if compiling():
        return None
    try:
        if hasattr(x, "get") and not hasattr(x, "__array_namespace__"):
            return x.get()
        return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    except (TypeError, RuntimeError):  # what tracers of JAX and of PyTorch raise
        return None


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


def overflow_as_nan(x: Any, xp: Any) -> Any:
    """Replace infinities by NaN, which no later step hides: a weight of exp(-inf) is 0."""
    return xp.where(xp.abs(x) == math.inf, xp.full_like(x, math.nan), x)


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
