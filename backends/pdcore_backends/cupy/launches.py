"""Launches that are checked against what the device allows, before CUDA would fail on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pdcore.extend import UnsupportedError

__all__ = ["CheckedKernel", "Limits", "Usage"]


class Limits(NamedTuple):
    """What a device allows, as it says itself.

    Attributes
    ----------
    threads, registers, shared : int
        Of a block: threads, registers of all of them, bytes of shared memory at most.
    grid : tuple of int
        Blocks along each axis.
    """

    threads: int
    registers: int
    shared: int
    grid: tuple[int, int, int]


class Usage(NamedTuple):
    """What a compiled kernel takes.

    Attributes
    ----------
    registers : int
        Of a thread.
    threads : int
        Of a block, beyond which a launch fails for want of registers.
    shared : int
        Bytes of shared memory of a block, beside what a launch asks for.
    """

    registers: int
    threads: int
    shared: int


class CheckedKernel:
    """A kernel whose launches are refused, with the reason, where the device cannot run them."""

    def __init__(
        self, name: str, kernel: Callable[..., None], usage: Usage, limits: Limits
    ) -> None:
        self.name, self.kernel, self.usage, self.limits = name, kernel, usage, limits

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: Any, *, shared_mem: int = 0
    ) -> None:
        """Launch on the current stream."""
        why = self.refusal(grid, block, shared_mem)
        if why:
            raise UnsupportedError(
                f"kernel {self.name}: {why}; pass a smaller call, or another backend"
            )
        self.kernel(grid, block, arguments, shared_mem=shared_mem)

    def refusal(self, grid: tuple[int, ...], block: tuple[int, ...], shared_mem: int) -> str:
        """Say what a launch asks for beyond the device's limits, nothing if it can run."""
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
