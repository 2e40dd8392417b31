"""Run CUDA C++ kernels on the CPU, one fibre per thread, with the interface of `cupy.RawModule`."""

from __future__ import annotations

from .arguments import Structure
from .compiler import CompileError
from .module import EmulationError, Kernel, RawModule, empty
from .settings import SCHEDULES, Settings, environment, using

__all__ = [
    "RawModule",
    "Kernel",
    "Structure",
    "empty",
    "EmulationError",
    "CompileError",
    "SCHEDULES",
    "Settings",
    "using",
    "environment",
]
