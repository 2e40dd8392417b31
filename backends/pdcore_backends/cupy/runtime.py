"""The interface to CUDA: compiler, memory and device, by CuPy or by an emulator in tests.

Arrays are those of CuPy, or of NumPy under the emulator: the launch code uses only their shapes and
strides, and this protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from threading import Lock
from typing import Any, Protocol

from pdcore.extend import UnsupportedError

from .launches import CheckedKernel, Limits, Usage

__all__ = [
    "BLOCKS",
    "CAPABILITY",
    "OPTIONS",
    "SHARED",
    "Kernel",
    "KernelCache",
    "KernelSource",
    "Runtime",
    "too_old",
]

#: The oldest compute capability of the kernels, and the most blocks of a grid along two axes.
CAPABILITY = 75
BLOCKS = 2**31 - 1, 65535

#: The options of the compiler, NVRTC's.
OPTIONS = ("-std=c++17",)

#: Bytes of shared memory that every kernel may use without a declaration.
SHARED = 48 * 1024

#: Called as ``kernel(grid, block, arguments, shared_mem=bytes)``, on the current stream.
Kernel = Callable[..., None]


class Runtime(Protocol):
    """A device and its compiler."""

    def on(self, array: Any) -> AbstractContextManager[Any]:
        """Return a context in which the device of an array is the current one."""

    def device(self) -> int:
        """Return the index of the current device."""

    def capability(self, device: str) -> int:
        """Return the compute capability of a device such as ``"cuda:0"``, 90 for 9.0."""

    def capturing(self) -> bool:
        """Return whether the current stream is being captured into a CUDA graph."""

    def compile(self, code: str, name: str, shared: int = 0) -> Kernel:
        """Compile a source for the current device, and return one of its kernels by name.

        `shared` is the dynamic shared memory of its launches in bytes; more than `SHARED` must be
        declared here.
        """

    def address(self, array: Any) -> int:
        """Return the address of the first entry of an array."""

    def structure(self, value: Any, arrays: Mapping[int, Any]) -> Any:
        """Return a structure as a kernel argument, with pointers to arrays at byte offsets."""

    def usage(self, kernel: Kernel) -> Usage:
        """Return the resources of a compiled kernel, which this loads on the current device."""

    def limits(self) -> Limits:
        """Return the limits of the current device."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Allocate a C-contiguous array on the current device."""


def too_old(capability: int) -> str:
    """Return why the kernels do not run on a compute capability; empty if they do."""
    if capability >= CAPABILITY:
        return ""
    return (
        f"the device has compute capability {capability / 10}, and the kernels are for "
        f"{CAPABILITY / 10} and later"
    )


class KernelSource(Protocol):
    """A program, hashable, that has the source of its kernels."""

    def text(self, kernel: str) -> str:
        """Return the source of a kernel, by the name of a template instantiation."""


class KernelCache:
    """The kernels of one runtime, compiled at their first use on each device."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._compiled: dict[tuple[int, KernelSource, str], Kernel] = {}
        self._allowed: dict[int, Limits] = {}
        self._lock = Lock()

    def kernel(self, program: KernelSource, name: str, shared: int = 0) -> Kernel:
        """Return a kernel for the current device, see `Runtime.compile`.

        Raises
        ------
        UnsupportedError
            Where the kernel is not compiled yet and the stream is being captured: loading a module
            may allocate and wait for the device, which a capture forbids.
        """
        key = (self.runtime.device(), program, name)
        with self._lock:
            checked = self._compiled.get(key)
            if checked is None:
                if self.runtime.capturing():
                    raise UnsupportedError(
                        f"the kernel {name} is not compiled yet, and the stream is being captured "
                        "into a CUDA graph, which cannot load it; make the same call once before "
                        "the capture, forward and backward if both are captured"
                    )
                compiled = self.runtime.compile(program.text(name), name, shared)
                checked = CheckedKernel(
                    name, compiled, self.runtime.usage(compiled), self._limits(key[0])
                )
                self._compiled[key] = checked
        return checked

    def _limits(self, device: int) -> Limits:
        if device not in self._allowed:
            self._allowed[device] = self.runtime.limits()
        return self._allowed[device]
