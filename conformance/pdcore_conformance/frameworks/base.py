"""What the suite needs of an array library, implemented by the array-API standard alone."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from pdcore.arrays import device_name, dtype_name, library_of

__all__ = [
    "FLOATS",
    "TRANSFORMATIONS",
    "Framework",
    "Function",
    "Memory",
    "has_own_elements",
    "with_strides_kept",
]

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Any]

#: A function that is differentiated, mapped or compiled: from arrays by name to (out, lse), where
#: lse may be None.
Function = Callable[[Arrays], tuple[Any, Any]]

FLOATS = ("float16", "bfloat16", "float32", "float64")

#: The transformations of a framework, by the features of `pdcore.backend.FEATURES`.
TRANSFORMATIONS = ("autodiff", "double_backward", "vmap", "jvp", "compile")


class Memory(ABC):
    """The peak memory of a device, as the framework of the device reports it."""

    @abstractmethod
    def reset(self) -> None:
        """Start a measurement at the memory that is allocated now."""

    @abstractmethod
    def read(self) -> int | None:
        """Return the bytes by which the peak since `reset` exceeds the memory at `reset`.

        Returns
        -------
        int or None
            None where the framework cannot tell, because an earlier peak was higher.
        """


class Framework:
    """An array library by the array-API standard alone: no gradients, maps or compilers.

    Attributes
    ----------
    library : str
        The import name.
    poisons : bool
        Whether `poisoned` has an effect.
    compiles : bool
        Whether every new way to run a call is compiled, which takes longer than the call.
    """

    #: The members of `TRANSFORMATIONS` that the library has.
    transformations: ClassVar[frozenset[str]] = frozenset()
    poisons: ClassVar[bool] = False
    #: The feature by which `shard` cuts a sequence, ``"axis_name"`` or ``"group"``.
    shards_by: ClassVar[str | None] = None
    compiles: ClassVar[bool] = False

    def __init__(self, library: str) -> None:
        self.library = library

    def __repr__(self) -> str:
        return f"<framework {self.library}>"

    @cached_property
    def module(self) -> Any:
        """The library, imported."""
        return importlib.import_module(self.library)

    @cached_property
    def xp(self) -> Any:
        """The array-API namespace of the library, from array-api-compat where that supports it."""
        name = f"array_api_compat.{self.library}"
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(f"{error.name}"):
                raise
        return self.module

    def shard(self, name: str, spec: str, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        """Compute (out, lse) of a backend with the sequence in shards, see `shards_by`."""
        raise NotImplementedError(f"{self.library} has no shards")

    # Availability.

    def available(self, device: str = "cpu") -> str | None:
        """Return why nothing can run on a device of this machine.

        Parameters
        ----------
        device : str
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

        Returns
        -------
        str or None
            None where it can.
        """
        reason = self.unimportable()
        if reason is not None:
            return reason
        if not any(_is_on(present, device) for present in self.devices()):
            return self.no_device(device)
        return None

    def unimportable(self) -> str | None:
        """Return why the library cannot be imported, None where it can."""
        if find_spec(self.library.partition(".")[0]) is None:
            return f"not installed: {self.library}"
        try:
            _ = self.xp
        except Exception as error:  # noqa: BLE001 - a broken installation is a reason, too
            text = " ".join(str(error).split())
            return f"{self.library} cannot be imported: {type(error).__name__}: {text}"
        return None

    def no_device(self, device: str) -> str:
        """Return the message that a device does not exist."""
        if device.partition(":")[0] == "cuda":
            return f"{self.library} {self.version()} sees no CUDA device" + (
                "" if device == "cuda" else f" {device}"
            )
        return f"{self.library} {self.version()} has no device {device}, only " + ", ".join(
            self.devices()
        )

    def devices(self) -> list[str]:
        """List the devices of this machine, the default one first."""
        return ["cpu"]

    def version(self) -> str:
        """Return the version of the library."""
        return str(getattr(self.module, "__version__", "of unknown version"))

    def versions(self) -> dict[str, str]:
        """Return the versions of the library and of the software on which its results depend."""
        return {self.library: self.version()}

    def missing(self, feature: str) -> str | None:
        """Return why the library does not have a feature of `pdcore.backend.FEATURES` here.

        Parameters
        ----------
        feature : str
            A dtype, or one of ``autodiff``, ``double_backward``, ``vmap``, ``jvp``, ``compile``.

        Returns
        -------
        str or None
            None where it has the feature.
        """
        if feature in TRANSFORMATIONS:
            if feature not in self.transformations:
                return f"{self.library} has no {feature}"
            return None
        if feature in FLOATS and not self.has_dtype(feature):
            return f"{self.library} {self.version()} has no {feature}"
        return None

    def has_dtype(self, name: str) -> bool:
        """Return whether the library has arrays of a dtype."""
        return hasattr(self.xp, name)

    # Arrays.

    def asarray(self, x: Array, device: str = "cpu") -> Any:
        """Copy a NumPy array to a device.

        Parameters
        ----------
        x : numpy.ndarray
            float16, bfloat16 (of ml_dtypes), float32, float64, bool, int32 or int64. Its strides
            are kept where the library has strides.
        device : str
            The device.

        Raises
        ------
        TypeError
            When the library has no such dtype.
        """
        result = self.xp.asarray(x)
        if dtype_name(result) != str(x.dtype):
            raise TypeError(f"{self.library} makes {dtype_name(result)} of {x.dtype}")
        return result

    def asnumpy(self, x: Any) -> Array:
        """Convert an array to NumPy; bfloat16 becomes that of ml_dtypes."""
        try:
            return np.from_dlpack(x)
        except (AttributeError, BufferError, RuntimeError, TypeError):
            return np.asarray(x)

    def is_array(self, x: Any) -> bool:
        """Return whether an object is an array of this library."""
        try:
            return library_of(x, "x") == self.library
        except TypeError:
            return False

    def device_of(self, x: Any) -> str:
        """Return the device of an array, as in ``"cpu"`` or ``"cuda:0"``."""
        return device_name(x, self.library)

    def is_writeable(self, x: Any) -> bool:
        """Return whether a caller may write into an array; True where arrays are immutable."""
        return True

    def shares_memory(self, x: Any, y: Any) -> bool:
        """Return whether writing into one array changes another."""
        return False

    def overwrite(self, x: Any, values: Array) -> bool:
        """Replace the values of an array in place; return False where arrays are immutable."""
        return False

    def dtype_of(self, x: Any) -> str:
        """Return the dtype of an array, as in ``"float32"``, ``"bfloat16"`` or ``"bool"``."""
        return dtype_name(x)

    def synchronize(self, result: Any = None) -> None:
        """Wait until a result is computed; None waits for all work so far."""

    def release(self) -> None:
        """Free memory and compiled programs that the library caches."""

    # Precision and memory.

    @contextmanager
    def precision(self, dtype: str) -> Iterator[None]:
        """Compute in the full precision of a dtype in a block: float32 without TF32, for example.

        The setting is global, so that it also holds for threads that the block starts.
        """
        yield

    def policy(self) -> str:
        """Describe in one line, for the record, what `precision` means in this library."""
        return "every dtype is computed as its name says"

    @contextmanager
    def unpooled(self) -> Iterator[None]:
        """Allocate each array separately in a block: in a pool, a sanitizer misses its bounds."""
        yield

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Fill memory from the library's uninitialised allocators with NaN.

        Integers get large numbers. Nothing happens where `poisons` is False.
        """
        yield

    # Transformations of a function of arrays by name, which differentiate by each of the arrays.

    @property
    def has_autodiff(self) -> bool:
        """Whether the library has automatic differentiation."""
        return "autodiff" in self.transformations

    def vjp(
        self, function: Function, arrays: Arrays, cotangents: tuple[Any, Any]
    ) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Compute gradients by the library's reverse mode.

        Parameters
        ----------
        function : callable
            From arrays by name to (out, lse).
        arrays : mapping of str to array
            The arguments of the function, by which it is differentiated.
        cotangents : tuple
            The cotangents of out and lse; that of lse may be None.

        Returns
        -------
        outputs : tuple of array
            (out, lse).
        gradients : dict of str to array
            The gradient by each of `arrays`; zeros where the result does not depend on it.
        """
        raise self._lacks("autodiff")

    def recorded(self, function: Function, arrays: Arrays) -> tuple[Any, Any]:
        """Compute (out, lse) while the library records the computation for its reverse mode."""
        raise self._lacks("autodiff")

    def double_vjp(
        self, function: Function, arrays: Arrays, cotangents: tuple[Any, Any], directions: Arrays
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compute gradients, and the gradients of sum_n <directions[n], gradient by n>.

        Returns
        -------
        gradients, second : dict of str to array
            The gradients that `vjp` returns, and the gradients of the sum by each of `arrays`,
            which are also the derivatives of `gradients` along `directions`.
        """
        raise self._lacks("double_backward")

    def jvp(
        self, function: Function, arrays: Arrays, directions: Arrays
    ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Compute (out, lse) and their derivatives along directions, by forward mode."""
        raise self._lacks("jvp")

    def vmap(self, function: Function) -> Function:
        """Return the function mapped over the first axis of its arrays and of its results."""
        raise self._lacks("vmap")

    def compile(self, function: Function) -> Function:
        """Compile a function as one program; raise where that is not possible."""
        raise self._lacks("compile")

    def _lacks(self, feature: str) -> NotImplementedError:
        return NotImplementedError(self.missing(feature) or f"{self!r}: {feature} is not written")

    # Speed and memory. A function here maps arrays by name to out alone.

    def prepared(self, function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
        """Return the function as users call it often: compiled, where the library compiles."""
        return function

    def step(
        self, function: Callable[[Arrays], Any]
    ) -> Callable[[Arrays, Any], tuple[Any, dict[str, Any]]]:
        """Return a function from arrays and a cotangent to out and the gradients."""
        raise self._lacks("autodiff")

    def finish(self, result: Any) -> Any:
        """Wait until a result is computed, and return it."""
        self.synchronize(result)
        return result

    def seconds(self, call: Callable[[], Any], repeat: int, device: str = "cpu") -> float:
        """Return the seconds that a device takes for each of some calls, one after the other.

        On a GPU the calls are issued back to back, so that the time of the host to issue one is
        hidden where it is shorter than that of the device.
        """
        started = time.perf_counter()
        for _ in range(repeat):
            self.finish(call())
        return (time.perf_counter() - started) / repeat

    def host_seconds(self, call: Callable[[], Any], repeat: int) -> float:
        """Return the seconds until the host has issued each of some calls to the device."""
        self.synchronize()
        started = time.perf_counter()
        for _ in range(repeat):
            call()
        seconds = (time.perf_counter() - started) / repeat
        self.synchronize()
        return seconds

    def broken(self, device: str) -> str | None:
        """Return the error of a device that computes nothing more, None where it still computes.

        Some errors of CUDA, such as an illegal address, last until the process ends: every later
        call fails with them, whatever it computes.
        """
        try:
            self.finish(self.asarray(np.ones(8, np.float32), device) + 1)
        except Exception as error:  # noqa: BLE001 - every error means the same here
            return f"{type(error).__name__}: {error}"
        return None

    def memory(self, device: str) -> Memory | None:
        """Return a `Memory` of a device, None where the library does not report memory."""
        return None

    def gpu(self, device: str) -> dict[str, Any] | None:
        """Describe a GPU: ``name``, ``memory_gib``, ``driver``, ``capability``; None for a CPU."""
        return None


def _is_on(present: str, wanted: str) -> bool:
    return present == wanted or present.partition(":")[0] == wanted


def has_own_elements(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether every element of an array has memory of its own: none is broadcast."""
    return 0 in shape or all(n <= 1 or step for n, step in zip(shape, strides, strict=True))


def with_strides_kept(x: Array) -> tuple[Array, tuple[int, ...], int]:
    """Copy the memory that an array spans, and describe the layout of the array in it.

    Returns
    -------
    buffer : array (span,)
        A one-dimensional, contiguous array of the same dtype.
    strides : tuple of int
        The strides of the array, in elements.
    start : int
        The index in `buffer` of the array's first element.
    """
    size = x.dtype.itemsize
    if any(stride % size for stride in x.strides):
        x = np.ascontiguousarray(x)
    strides = tuple(stride // size for stride in x.strides)
    reach = [(n - 1) * s for n, s in zip(x.shape, strides, strict=True)] if x.size else []
    start = -sum(r for r in reach if r < 0)
    buffer = np.zeros(start + sum(r for r in reach if r > 0) + 1 if x.size else 0, x.dtype)
    np.ndarray(x.shape, x.dtype, buffer, start * size if x.size else 0, x.strides)[...] = x
    return buffer, strides, start
