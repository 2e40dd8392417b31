"""The CUDA kernels that the calls of a run launch, found without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from pdcore.backend import SilentBackend
from pdcore.plugins import register_backend, unregister_backend
from pdcore_backends.cupy import INFO
from pdcore_backends.cupy.kernel_backend import KernelBackend
from pdcore_backends.cupy.launches import Limits, Usage
from pdcore_backends.cupy.runtime import Kernel

from ..judge.calls import Call, drawn
from ..judge.subject import Subject
from ..judge.ways import run
from .calls import KERNELS, PATHS, Judged
from .stages import workloads
from .variants import EIGHT_WARPS, SCALE_IN_REGISTER, changed

__all__ = ["ARCHITECTURE", "kernels"]

#: The GPU that is prepared for, an H100 or H200.
ARCHITECTURE = "sm_90"


class _Runtime:
    """A device that notes which kernels are compiled, and runs none; its arrays are NumPy's."""

    def __init__(self) -> None:
        self.compiled: dict[tuple[str, str], None] = {}

    def on(self, array: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def device(self) -> int:
        return 0

    def capability(self, device: str) -> int:
        return int(ARCHITECTURE.removeprefix("sm_"))

    def capturing(self) -> bool:
        return False

    def compile(self, code: str, name: str, shared: int = 0) -> Kernel:
        self.compiled[code, name] = None
        return lambda *arguments, **keywords: None

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def structure(self, value: Any, arrays: Mapping[int, Any]) -> Any:
        return value

    def usage(self, kernel: Kernel) -> Usage:
        return Usage(registers=64, threads=1024, shared=0)

    def limits(self) -> Limits:
        return Limits(1024, 65536, 227 * 1024, (2**31 - 1, 65535, 65535))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)


class _Backend(SilentBackend, KernelBackend):
    """The CuPy backend on NumPy's arrays and `_Runtime`."""

    info = replace(
        INFO,
        name="cupy_compiled_only",
        library="numpy",
        load=f"{__name__}:_Backend",
        requires=("numpy",),
        devices=("cpu",),
    )

    def __init__(self) -> None:
        KernelBackend.__init__(self, _Runtime())


@contextmanager
def _subject() -> Iterator[Subject]:
    register_backend(_Backend.info)
    try:
        yield Subject(_Backend.info.name)
    finally:
        unregister_backend(_Backend.info.name)


def kernels() -> list[tuple[str, str]]:
    """Return the source and the name of each kernel that the run launches before the suite."""
    with _subject() as subject:
        for call, through in chain(KERNELS.values(), PATHS["cupy"].values(), _timed()):
            for _ in run(subject, call, drawn(call), through):
                pass  # the results are zeros
        backend: Any = subject.backend
        found = list(backend.runtime.compiled)
    for changes in (EIGHT_WARPS, SCALE_IN_REGISTER):
        found += [(changed(code, name, changes), name) for code, name in found]
    return list(dict.fromkeys(found))


def _timed() -> Iterator[Judged]:
    """Yield the timed calls with few rows, which launch the same kernels."""
    for workload in workloads("cuda"):
        _, heads, _, dim = workload.shape
        call = Call(
            workload.spec,
            workload.dtype,
            lead=(1,),
            heads=heads,
            key_heads=heads,
            rows=260,
            keys=260,
            dim=dim,
            value_dim=dim,
        )
        yield Judged(call, "forward" if workload.direction == "forward" else "vjp")
