"""Plans on CuPy arrays: kernels of our own, and `ArrayBackend` with its pullbacks elsewhere."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import cupy

from pdcore.backend import Request

from . import INFO
from .fused import KernelBackend
from .runtime import Kernel

__all__ = ["CupyBackend"]


class CupyRuntime:
    """NVRTC, the memory pool and the current stream, by CuPy."""

    def on(self, array: Any) -> AbstractContextManager[Any]:
        """Enter the array's device, see `Runtime.on`."""
        device: AbstractContextManager[Any] = array.device
        return device

    def device(self) -> int:
        """Give the thread's device, see `Runtime.device`."""
        return int(cupy.cuda.runtime.getDevice())

    def capability(self, device: str) -> int:
        """Ask the driver, see `Runtime.capability`; arrays of the host will be on device 0."""
        return int(cupy.cuda.Device(int(device.partition(":")[2] or 0)).compute_capability)

    def compile(self, code: str, name: str) -> Kernel:
        """Compile by NVRTC; CuPy keeps the result on disk, see `Runtime.compile`."""
        module = cupy.RawModule(code=code, options=("-std=c++17",), name_expressions=(name,))
        kernel: Kernel = module.get_function(name)
        return kernel

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Allocate from the pool, see `Runtime.empty`."""
        return cupy.empty(shape, dtype)


class CupyBackend(KernelBackend):
    """Runs plans on CuPy arrays."""

    info = INFO

    def __init__(self) -> None:
        super().__init__(CupyRuntime())

    def refusals(self, request: Request) -> list[str]:
        """Say why the backend cannot run a call, see `Backend.refusals`."""
        reasons = super().refusals(request)
        count, why = _devices()
        if not count:
            reasons.append(f"CuPy {cupy.__version__} sees no CUDA device{why}")
        if request.dtype == "float32" and os.environ.get("CUPY_TF32", "0") == "1":
            reasons.append("float32 inputs: CUPY_TF32=1 sets matrix products to TF32; unset it")
        return reasons

    def exchange(self, array: Any, device: str | None = None) -> Any:
        """Take an array by DLPack on a GPU, by a copy from the host or to it."""
        if device is None:
            return cupy.from_dlpack(array)
        if device == "cpu":
            return cupy.asnumpy(array)
        index = int(device.partition(":")[2] or 0)
        with cupy.cuda.Device(index):
            # `asarray` copies from the host, and from another GPU; `from_dlpack` refuses to.
            return cupy.asarray(array)

    def synchronize(self) -> None:
        """Wait for the current device."""
        cupy.cuda.get_current_stream().synchronize()

    def versions(self) -> dict[str, str]:
        """Give the versions of CuPy and of its CUDA runtime."""
        found = {"cupy": str(cupy.__version__)}
        if _devices()[0]:
            found["cuda"] = str(cupy.cuda.runtime.runtimeGetVersion())
        return found


def _devices() -> tuple[int, str]:
    """Count the CUDA devices; where there are none, say what CUDA says."""
    try:
        return int(cupy.cuda.runtime.getDeviceCount()), ""
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return 0, f": {error}"
