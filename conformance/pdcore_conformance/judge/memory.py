"""Measure the peak memory of a call, on the host and on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..frameworks import Framework

__all__ = ["HostMemory", "peak"]


class HostMemory:
    """The peak of the resident memory of this process, on Linux.

    The kernel keeps the peak and sets it to the present size on request, so that memory of every
    library and of every allocator counts.
    """

    def __init__(self) -> None:
        self.before = 0

    def reset(self) -> bool:
        """Start a measurement; return whether the system allows it."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.before = _status("VmRSS")
            return True
        return False

    def read(self) -> int:
        """Return the bytes by which the peak since `reset` exceeds the memory at `reset`."""
        return _status("VmHWM") - self.before


def peak(call: Callable[[], Any], framework: Framework, device: str) -> dict[str, int]:
    """Return the peak memory of a call beyond the memory before, in bytes, by place.

    Returns
    -------
    dict of str to int
        ``host``, and ``device`` where the framework reports one; a place that cannot be measured
        is absent.
    """
    host, other = HostMemory(), framework.memory(device)
    result: dict[str, int] = {}
    measured = host.reset()
    if other is not None:
        other.reset()
    framework.finish(call())
    if measured:
        result["host"] = host.read()
    bytes_of = None if other is None else other.read()
    if bytes_of is not None:
        result["device"] = bytes_of
    return result


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
