"""Measure the peak memory of a call, on the host and on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..bench.memory import MIB, status
from ..frameworks import Framework
from ..frameworks.base import Memory

__all__ = ["HostMemory", "peak"]


class HostMemory(Memory):
    """The peak of the resident memory of this process, on Linux.

    The kernel keeps the peak and sets it to the present size on request, so that memory of every
    library and of every allocator counts.
    """

    def __init__(self) -> None:
        self._before: float | None = None

    def reset(self) -> None:
        """Start a measurement at the memory that is resident now."""
        self._before = None
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._before = status("VmRSS")

    def read(self) -> int | None:
        """Return the bytes of the peak since `reset`; None where the system does not tell."""
        highest = status("VmHWM")
        if self._before is None or highest is None:
            return None
        return int((highest - self._before) * MIB)


def peak(call: Callable[[], Any], framework: Framework, device: str) -> dict[str, int]:
    """Return the peak memory of a call beyond the memory before, in bytes, by place.

    Returns
    -------
    dict of str to int
        ``host``, and ``device`` where the framework reports one; a place that cannot be measured
        is absent.
    """
    memories = {"host": HostMemory(), "device": framework.memory(device)}
    places = {place: memory for place, memory in memories.items() if memory is not None}
    for memory in places.values():
        memory.reset()
    framework.finish(call())
    sizes = {place: memory.read() for place, memory in places.items()}
    return {place: size for place, size in sizes.items() if size is not None}
