"""The machine and the versions that a record was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .writing import Environment, Gpu

__all__ = ["environment", "gpu", "versions"]

#: Distributions whose versions decide numbers or speed. A backend reports those of its framework.
_PACKAGES = ("pdcore", "numpy", "array-api-compat", "ml_dtypes", "scipy", "threadpoolctl")


def environment(device: str = "cpu") -> Environment:
    """Return a description of the machine.

    Parameters
    ----------
    device : str
        Where the backend runs; a GPU is described for ``"cuda"`` only.

    Returns
    -------
    dict
        `pdcore_conformance.record.Environment`; None for what the system does not report.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    blas, threads = _blas()
    return {
        "cpu": _cpu(),
        "cores": cores or 1,
        "threads": threads,
        "blas": blas,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_gib": _memory(),
        "platform": platform.platform(),
        "gpu": gpu() if device.startswith("cuda") else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that pdcore needs."""
    numbers = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = importlib.metadata.version(name)
    if "pdcore" not in numbers:  # a checkout that is not installed
        from pdcore import __version__

        numbers["pdcore"] = __version__
    return numbers


def gpu() -> Gpu | None:
    """Return a description of the first GPU, by nvidia-smi; None where there is none."""
    query = "name,memory.total,driver_version,compute_cap"
    try:
        completed = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
        name, memory, driver, capability = map(
            str.strip, completed.stdout.splitlines()[0].split(",")
        )
        return {
            "name": name,
            "memory_gib": round(float(memory) / 1024, 1),
            "driver": driver,
            "capability": capability,
        }
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def _blas() -> tuple[str | None, int | None]:
    try:
        from threadpoolctl import threadpool_info
    except ModuleNotFoundError:
        return None, None
    for pool in threadpool_info():
        if pool["user_api"] == "blas":
            core = f" for {pool['architecture']}" if pool.get("architecture") else ""
            return f"{pool['internal_api']} {pool['version']}{core}", int(pool["num_threads"])
    return None, None


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
