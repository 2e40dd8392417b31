"""Launches that are checked against the limits of the device, before CUDA fails on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pdcore.extend import UnsupportedError

__all__ = ["CheckedKernel", "Limits", "Usage"]


class Limits(NamedTuple):
    """The limits of a device, as the driver reports them.

    Attributes
    ----------
    threads, registers, shared : int
        The most threads, registers of all threads, and bytes of shared memory of a block.
    grid : tuple of int
        The most blocks along each axis.
    """

    threads: int
    registers: int
    shared: int
    grid: tuple[int, int, int]


class Usage(NamedTuple):
    """The resources of a compiled kernel.

    Attributes
    ----------
    registers : int
        Registers of a thread.
    threads : int
        The most threads of a block; a launch with more has too few registers.
    shared : int
        Static shared memory of a block in bytes, in addition to that of the launch.
    """

    registers: int
    threads: int
    shared: int


class CheckedKernel:
    """A kernel that refuses launches beyond the limits of the device, with the reason."""

    def __init__(
        self, name: str, kernel: Callable[..., None], usage: Usage, limits: Limits
    ) -> None:
        self.name, self.kernel, self.usage, self.limits = name, kernel, usage, limits

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: Any, *, shared_mem: int = 0
    ) -> None:
        """Launch the kernel on the current stream.

        Raises
        ------
        UnsupportedError
            Where the launch is beyond a limit of the device.
        """
        why = self.refusal(grid, block, shared_mem)
        if why:
            raise UnsupportedError(
                f"kernel {self.name}: {why}; pass a smaller call, or another backend"
            )
        self.kernel(grid, block, arguments, shared_mem=shared_mem)

    def refusal(self, grid: tuple[int, ...], block: tuple[int, ...], shared_mem: int) -> str:
        """Return which limit of the device a launch exceeds; empty if it can run."""
        limits, usage = self.limits, self.usage
        for axis, count, most in zip("xyz", grid, limits.grid, strict=False):
            if count > most:
                return f"a grid of {grid} blocks, and the device has {most} along {axis} at most"
        threads = 1
        for count in block:
            threads *= count
        if threads > limits.threads:
            return f"a block of {threads} threads, and the device has {limits.threads} at most"
        if threads > usage.threads or threads * usage.registers > limits.registers:
            return (
                f"{threads} threads of {usage.registers} registers each, and a block of the "
                f"device has {limits.registers}"
            )
        shared = shared_mem + usage.shared
        if shared > limits.shared:
            return f"{shared} bytes of shared memory, and a block of the device has {limits.shared}"
        return ""
