"""The settings under which kernels run: schedule, sanitizer, emulated device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from .compiler import sanitizer_library

__all__ = ["SCHEDULES", "SANITIZERS", "Settings", "environment", "settings", "using"]

#: The schedules, in the order of `Schedule` in native/runtime.h.
SCHEDULES = ("lockstep", "reversed", "random", "greedy", "greedy_reversed")
SANITIZERS = ("", "address", "thread")
#: KiB of shared memory that a block may request, by compute capability.
SHARED_LIMITS = {"75": 64, "80": 163, "86": 99, "87": 163, "89": 99, "90": 227, "100": 227}
#: Bytes of shared memory that a block may have without a request.
SHARED_DEFAULT = 48 * 1024


@dataclass(frozen=True)
class Settings:
    """The settings under which kernels run.

    Attributes
    ----------
    schedule : str
        One of `SCHEDULES`, which chooses the next thread when several can run.
    seed : int
        The seed of the schedule ``"random"``.
    compute_capability : str
        The emulated device, as in ``sm_90``: it sets `__CUDA_ARCH__` and the limits of a launch.
    sanitize : str
        ``"address"`` (with undefined behaviour), ``"thread"``, or empty.
    """

    schedule: str = "lockstep"
    seed: int = 0
    compute_capability: str = "90"
    sanitize: str = ""

    def __post_init__(self) -> None:
        known = {
            "schedule": SCHEDULES,
            "sanitize": SANITIZERS,
            "compute_capability": tuple(SHARED_LIMITS),
        }
        for name, values in known.items():
            if (got := getattr(self, name)) not in values:
                raise ValueError(f"{name}: got {got!r}, expected one of {values}")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected 0 or more")

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a block may request."""
        return SHARED_LIMITS[self.compute_capability] * 1024


def _from_environment() -> Settings:
    default = Settings()

    def read(name: str) -> str:
        return os.environ.get(f"CUDA_ON_CPU_{name.upper()}", str(getattr(default, name)))

    return Settings(
        read("schedule"), int(read("seed")), read("compute_capability"), read("sanitize")
    )


_CURRENT: ContextVar[Settings | None] = ContextVar("cuda_on_cpu_settings", default=None)


def settings() -> Settings:
    """Return the settings of `using`, or of the variables CUDA_ON_CPU_SCHEDULE and so on."""
    return _CURRENT.get() or _from_environment()


@contextmanager
def using(**changes: Any) -> Iterator[Settings]:
    """Change the settings within a ``with`` block, see `Settings`."""
    token = _CURRENT.set(replace(settings(), **changes))
    try:
        yield settings()
    finally:
        _CURRENT.reset(token)


def environment(sanitize: str) -> dict[str, str]:
    """Return the variables for a process whose kernels run under a sanitizer.

    The library of a sanitizer must be loaded first, so a running process cannot be changed.
    """
    if sanitize not in SANITIZERS[1:]:
        raise ValueError(f"sanitize: got {sanitize!r}, expected one of {SANITIZERS[1:]}")
    return {
        **os.environ,
        "CUDA_ON_CPU_SANITIZE": sanitize,
        "LD_PRELOAD": sanitizer_library(sanitize),
        # Python does not free all memory at exit; NumPy's threads are not part of the kernels.
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
