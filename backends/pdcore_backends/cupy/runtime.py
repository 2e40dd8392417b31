"""What launches need of CUDA: a compiler, memory, and the device; CuPy's, or another's in tests.

Arrays are the caller's library's, and may be NumPy's under an emulator: everything else of the
launch code asks for nothing but shapes, strides and this protocol.
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
    "SHARED",
    "Kernel",
    "KernelCache",
    "KernelSource",
    "Runtime",
    "too_old",
]

#: The oldest devices that the kernels are compiled for, and how many blocks a grid may have.
CAPABILITY = 75
BLOCKS = 2**31 - 1, 65535

#: Bytes of shared memory that every launch may have.
SHARED = 48 * 1024

#: Called as ``kernel(grid, block, arguments, shared_mem=bytes)``, on the current stream.
Kernel = Callable[..., None]


class Runtime(Protocol):
    """Where kernels are compiled and run."""

    def on(self, array: Any) -> AbstractContextManager[Any]:
        """Make the device of an array the current one."""

    def device(self) -> int:
        """Give the current device's index."""

    def capability(self, device: str) -> int:
        """Give the compute capability of a device such as ``"cuda:0"``: 90 is 9.0."""

    def capturing(self) -> bool:
        """Whether the current stream is captured into a CUDA graph, rather than run."""

    def compile(self, code: str, name: str, shared: int = 0) -> Kernel:
        """Compile a program for the current device, and give one of its kernels by its name.

        `shared` is how many bytes of shared memory its launches ask for: more than `SHARED` are
        given to no kernel of which that has not been said.
        """

    def address(self, array: Any) -> int:
        """Give where an array begins."""

    def structure(self, value: Any, arrays: Mapping[int, Any]) -> Any:
        """Give a structure as kernels take it, with pointers to arrays at these bytes of it."""

    def usage(self, kernel: Kernel) -> Usage:
        """Say what a compiled kernel takes of the current device, which loads it there."""

    def limits(self) -> Limits:
        """Ask the current device what it allows."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Allocate an array without gaps on the current device."""


def too_old(capability: int) -> str:
    """Say that the kernels are not for a device of a compute capability, nothing if they are."""
    if capability >= CAPABILITY:
        return ""
    return (
        f"the device has compute capability {capability / 10}, and the kernels are for "
        f"{CAPABILITY / 10} and later"
    )


class KernelSource(Protocol):
    """What is compiled in; hashable."""

    def text(self, kernel: str) -> str:
        """Give the source of a kernel, by the name of an instantiation."""


class KernelCache:
    """The kernels of one runtime, compiled at first use for each device."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._compiled: dict[tuple[int, KernelSource, str], Kernel] = {}
        self._allowed: dict[int, Limits] = {}
        self._lock = Lock()

    def kernel(self, program: KernelSource, name: str, shared: int = 0) -> Kernel:
        """Give a kernel for the current device, see `Runtime.compile`.

        Raises
        ------
        UnsupportedError
            Where it is not there yet and the stream is being captured: loading a module may
            allocate and wait for the device, which a capture forbids.
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
