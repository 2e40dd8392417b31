"""Plans on CuPy arrays: `ArrayBackend`, with its own pullbacks."""

from __future__ import annotations

import os
from typing import Any

import cupy

from pdcore.array_backend import ArrayBackend
from pdcore.backend import Request

from . import INFO

__all__ = ["CupyBackend"]


class CupyBackend(ArrayBackend):
    """Runs plans on CuPy arrays."""

    info = INFO

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
