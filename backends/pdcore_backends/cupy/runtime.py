"""What launches need of CUDA: a compiler, memory, and the device; CuPy's, or another's in tests.

Arrays are the caller's library's, and may be NumPy's under an emulator: everything else of the
launch code asks for nothing but shapes, strides and this protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

__all__ = ["Kernel", "Runtime"]

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

    def compile(self, code: str, name: str) -> Kernel:
        """Compile a program for the current device, and give one of its kernels by its name."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Allocate an array without gaps on the current device."""
