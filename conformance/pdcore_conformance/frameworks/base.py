"""What the suite asks of an array library, and the answers that the array-API standard gives."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from pdcore.arrays import device_name, dtype_name, library_of

__all__ = ["FLOATS", "TRANSFORMATIONS", "Framework", "Function", "Memory", "with_strides_kept"]

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Any]

#: What is differentiated, mapped and compiled: arrays by name to (out, lse).
Function = Callable[[Arrays], tuple[Any, Any]]

FLOATS = ("float16", "bfloat16", "float32", "float64")

#: The transformations of a framework, by the features of `pdcore.backend.FEATURES`.
TRANSFORMATIONS = ("autodiff", "double_backward", "vmap", "jvp", "compile")


class Memory(ABC):
    """The peak memory of a device, as its framework tells it."""

    @abstractmethod
    def reset(self) -> None:
        """Begin a measurement, from what is allocated now."""

    @abstractmethod
    def read(self) -> int | None:
        """Give the bytes by which the peak since `reset` exceeds what was allocated then.

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
        Whether `poisoned` does anything.
    """

    #: Which of `TRANSFORMATIONS` it has.
    transformations: ClassVar[frozenset[str]] = frozenset()
    poisons: ClassVar[bool] = False

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
        """The library's array-API namespace, by array-api-compat where that knows it."""
        name = f"array_api_compat.{self.library}"
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(f"{error.name}"):
                raise
        return self.module

    # Where it runs.

    def available(self, device: str = "cpu") -> str | None:
        """Say why nothing can run on a device here.

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
        """Say why the library cannot be imported, None where it is."""
        if find_spec(self.library.partition(".")[0]) is None:
            return f"not installed: {self.library}"
        try:
            _ = self.xp
        except Exception as error:  # noqa: BLE001 - a broken installation is a reason, too
            text = " ".join(str(error).split())
            return f"{self.library} cannot be imported: {type(error).__name__}: {text}"
        return None

    def no_device(self, device: str) -> str:
        """Say that a device is not there."""
        if device.partition(":")[0] == "cuda":
            return f"{self.library} {self.version()} sees no CUDA device" + (
                "" if device == "cuda" else f" {device}"
            )
        return f"{self.library} {self.version()} has no device {device}, only " + ", ".join(
            self.devices()
        )

    def devices(self) -> list[str]:
        """Name the devices that are there, the default one first."""
        return ["cpu"]

    def version(self) -> str:
        """Give the library's version."""
        return str(getattr(self.module, "__version__", "of unknown version"))

    def versions(self) -> dict[str, str]:
        """Give the versions of all that the library's numbers come from."""
        return {self.library: self.version()}

    def missing(self, feature: str) -> str | None:
        """Say why a feature of `pdcore.backend.FEATURES` cannot be had of this library here.

        Parameters
        ----------
        feature : str
            A dtype, or one of ``autodiff``, ``double_backward``, ``vmap``, ``jvp``, ``compile``.

        Returns
        -------
        str or None
            None where it can.
        """
        if feature in TRANSFORMATIONS:
            if feature not in self.transformations:
                return f"{self.library} has no {feature}"
            return None
        if feature in FLOATS and not self.has_dtype(feature):
            return f"{self.library} {self.version()} has no {feature}"
        return None

    def has_dtype(self, name: str) -> bool:
        """Whether the library has arrays of a dtype."""
        return hasattr(self.xp, name)

    # Arrays.

    def asarray(self, x: Array, device: str = "cpu") -> Any:
        """Bring a NumPy array to a device.

        Parameters
        ----------
        x : numpy.ndarray
            float16, bfloat16 (of ml_dtypes), float32, float64, bool, int32 or int64. Its strides
            are kept where the library has strides.
        device : str
            Where to.

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
        """Bring an array to NumPy, bfloat16 as that of ml_dtypes."""
        try:
            return np.from_dlpack(x)
        except (AttributeError, BufferError, RuntimeError, TypeError):
            return np.asarray(x)

    def is_array(self, x: Any) -> bool:
        """Whether something is an array of this library."""
        try:
            return library_of(x, "x") == self.library
        except TypeError:
            return False

    def device_of(self, x: Any) -> str:
        """Name an array's device: ``"cpu"``, ``"cuda:0"``."""
        return device_name(x, self.library)

    def dtype_of(self, x: Any) -> str:
        """Name an array's dtype: ``"float32"``, ``"bfloat16"``, ``"bool"``."""
        return dtype_name(x)

    def synchronize(self, result: Any = None) -> None:
        """Wait until a result is there; None means all work so far."""

    def release(self) -> None:
        """Give back memory and compiled programs that the library keeps for later."""

    # How exact it is.

    @contextmanager
    def precision(self, dtype: str) -> Iterator[None]:
        """Compute in a dtype as its name says: float32 without TF32, float64 in float64.

        The setting is the process's, so that the threads of a block have it as well.
        """
        yield

    def policy(self) -> str:
        """Say, in one line for the record, what `precision` means here."""
        return "every dtype is computed as its name says"

    @contextmanager
    def unpooled(self) -> Iterator[None]:
        """Allocate memory for each array by itself, where a pool would hide its ends."""
        yield

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Fill memory from the library's uninitialised allocators with NaN.

        Integers get large numbers. Nothing happens where `poisons` is False.
        """
        yield

    # Transformations of a function of arrays by name; each array is one to differentiate by.

    @property
    def has_autodiff(self) -> bool:
        """Whether the library differentiates."""
        return "autodiff" in self.transformations

    def vjp(
        self, function: Function, arrays: Arrays, cotangents: tuple[Any, Any]
    ) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Pull cotangents back by the library's reverse mode.

        Parameters
        ----------
        function : callable
            Takes `arrays`, gives (out, lse).
        arrays : mapping of str to array
            What to differentiate by.
        cotangents : tuple
            Of out and lse; that of lse may be None.

        Returns
        -------
        outputs : tuple of array
            (out, lse).
        gradients : dict of str to array
            One for each of `arrays`; zeros where nothing depends on it.
        """
        raise self._lacks("autodiff")

    def double_vjp(
        self, function: Function, arrays: Arrays, cotangents: tuple[Any, Any], directions: Arrays
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Differentiate gradients: those of sum_n <directions[n], gradient of n>.

        Returns
        -------
        gradients, second : dict of str to array
            What `vjp` gives, and the gradients of that sum by each of `arrays`; which is also
            the derivative of `gradients` along `directions`.
        """
        raise self._lacks("double_backward")

    def jvp(
        self, function: Function, arrays: Arrays, directions: Arrays
    ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Push directions forward; give (out, lse) and their derivatives along them."""
        raise self._lacks("jvp")

    def vmap(self, function: Function) -> Function:
        """Map a function over the first axis of its arrays and of its results."""
        raise self._lacks("vmap")

    def compile(self, function: Function) -> Function:
        """Compile a function, as one program, or fail."""
        raise self._lacks("compile")

    def _lacks(self, feature: str) -> NotImplementedError:
        return NotImplementedError(self.missing(feature) or f"{self!r}: {feature} is not written")

    # What it costs. A function takes arrays by name here, and gives out alone.

    def prepared(self, function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
        """Make a function ready to be called many times, as its users would."""
        return function

    def step(
        self, function: Callable[[Arrays], Any]
    ) -> Callable[[Arrays, Any], tuple[Any, dict[str, Any]]]:
        """Make a function of arrays and a cotangent that gives out and the gradients."""
        raise self._lacks("autodiff")

    def finish(self, result: Any) -> Any:
        """Wait for a result, and give it."""
        self.synchronize(result)
        return result

    def memory(self, device: str) -> Memory | None:
        """Give the meter of a device's peak memory, None where the library has none."""
        return None

    def gpu(self, device: str) -> dict[str, Any] | None:
        """Describe a GPU: ``name``, ``memory_gib``, ``driver``, ``capability``; None for a CPU."""
        return None


def _is_on(present: str, wanted: str) -> bool:
    return present == wanted or present.partition(":")[0] == wanted


def with_strides_kept(x: Array) -> tuple[Array, tuple[int, ...], int]:
    """Copy the memory that an array spans, with its layout.

    Returns
    -------
    buffer : array (span,)
        One-dimensional and contiguous, of the array's dtype.
    strides : tuple of int
        In elements.
    start : int
        The element of `buffer` that is the array's first.
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
