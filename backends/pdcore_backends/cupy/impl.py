"""Plans on CuPy arrays: kernels of our own, and `ArrayBackend` with its pullbacks elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import cupy
import numpy as np

from pdcore.extend import Request, device_name, dtype_name, library_of

from . import INFO
from .kernel_backend import KernelBackend
from .launches import Limits, Usage
from .runtime import SHARED, Kernel

__all__ = ["CupyBackend"]

#: CUDA's cudaErrorStreamCaptureImplicit.
CAPTURE_IMPLICIT = 906


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

    def capturing(self) -> bool:
        """Ask the current stream, see `Runtime.capturing`."""
        try:
            return bool(cupy.cuda.get_current_stream().is_capturing())
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status != CAPTURE_IMPLICIT:
                raise
            return True  # the default stream may not even be asked while another is captured

    def compile(self, code: str, name: str, shared: int = 0) -> Kernel:
        """Compile by NVRTC; CuPy keeps the result on disk, see `Runtime.compile`."""
        module = cupy.RawModule(code=code, options=("-std=c++17",), name_expressions=(name,))
        function: Any = module.get_function(name)
        if shared > SHARED:
            function.max_dynamic_shared_size_bytes = shared
        kernel: Kernel = function
        return kernel

    def address(self, array: Any) -> int:
        """Give where an array begins, see `Runtime.address`."""
        return int(array.data.ptr)

    def structure(self, value: Any, arrays: Mapping[int, Any]) -> Any:
        """Put the arrays' addresses in, see `Runtime.structure`."""
        structure = np.frombuffer(bytearray(value.tobytes()), value.dtype)
        members = structure.view(np.uint64)
        for at, array in arrays.items():
            members[at // 8] = array.data.ptr
        return structure[0]

    def usage(self, kernel: Any) -> Usage:
        """Ask the driver, see `Runtime.usage`."""
        return Usage(kernel.num_regs, kernel.max_threads_per_block, kernel.shared_size_bytes)

    def limits(self) -> Limits:
        """Ask the driver, see `Runtime.limits`."""
        attributes = cupy.cuda.Device().attributes
        grid = tuple(attributes[f"MaxGridDim{axis}"] for axis in "XYZ")
        return Limits(
            attributes["MaxThreadsPerBlock"],
            attributes["MaxRegistersPerBlock"],
            attributes["MaxSharedMemoryPerBlockOptin"],
            grid,
        )

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
        if device == "cpu":
            return cupy.asnumpy(array)
        library = library_of(array, "array")
        index = 0 if device is None else int(device.partition(":")[2] or 0)
        there = library != "cupy" and device_name(array, library) == f"cuda:{index}"
        if device is None or there:
            half = dtype_name(array) == "bfloat16"
            with self.stream_of(array):
                # CuPy's DLPack has no bfloat16, so its bits travel.
                result = cupy.from_dlpack(_bits(array) if half else array)
                return result.view(_bfloat16()) if half else result
        with cupy.cuda.Device(index):
            # `asarray` copies from the host, and from another GPU; `from_dlpack` refuses to.
            return cupy.asarray(array)

    def give(self, array: Any, namespace: Any) -> Any:
        """Hand a result to another library, see `Backend.give`."""
        if dtype_name(array) != "bfloat16":
            return super().give(array, namespace)
        return namespace.from_dlpack(array.view("int16")).view(namespace.bfloat16)

    @contextmanager
    def stream_of(self, array: Any) -> Iterator[None]:
        """Run on PyTorch's current stream of a tensor's GPU, see `Backend.stream_of`."""
        if library_of(array, "array") != "torch" or array.device.type != "cuda":
            yield
            return
        pointer = sys.modules["torch"].cuda.current_stream(array.device).cuda_stream
        with cupy.cuda.Device(array.device.index), _stream(pointer):
            yield

    def synchronize(self) -> None:
        """Wait for the current device."""
        cupy.cuda.get_current_stream().synchronize()

    def versions(self) -> dict[str, str]:
        """Give the versions of CuPy and of its CUDA runtime."""
        versions = {"cupy": str(cupy.__version__)}
        if _devices()[0]:
            versions["cuda"] = str(cupy.cuda.runtime.runtimeGetVersion())
        return versions


class _Stream(NamedTuple):
    """A stream by the protocol that CuPy asks for; not every PyTorch's own streams have it."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def _stream(pointer: int) -> Any:
    """Take a stream of the current device."""
    if not pointer:
        return cupy.cuda.Stream.null
    return cupy.cuda.Stream.from_external(_Stream(pointer))


def _bits(array: Any) -> Any:
    """View an array of 16 bits, of PyTorch or JAX, as integers."""
    return array.view(sys.modules[library_of(array, "array")].__dict__.get("int16", "int16"))


def _bfloat16() -> Any:
    """Give the dtype, which is ml_dtypes' in CuPy too."""
    import ml_dtypes

    return ml_dtypes.bfloat16


def _devices() -> tuple[int, str]:
    """Count the CUDA devices; where there are none, say what CUDA says."""
    try:
        return int(cupy.cuda.runtime.getDeviceCount()), ""
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return 0, f": {error}"
