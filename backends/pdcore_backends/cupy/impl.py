"""Plans on CuPy arrays: CUDA kernels, and `ArrayBackend` for everything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import cupy
import numpy as np

from pdcore.extend import Request, device_name, dtype_name, library_of

from . import INFO, cubins
from .kernel_backend import KernelBackend
from .launches import Limits, Usage
from .runtime import OPTIONS, SHARED, Kernel

__all__ = ["CupyBackend"]

#: CUDA's cudaErrorStreamCaptureImplicit.
CAPTURE_IMPLICIT = 906


class CupyRuntime:
    """CuPy's NVRTC, memory pool and current stream."""

    def on(self, array: Any) -> AbstractContextManager[Any]:
        """Enter the array's device, see `Runtime.on`."""
        device: AbstractContextManager[Any] = array.device
        return device

    def device(self) -> int:
        """Return the device of the thread, see `Runtime.device`."""
        return int(cupy.cuda.runtime.getDevice())

    def capability(self, device: str) -> int:
        """Return the compute capability, of device 0 for the host, see `Runtime.capability`."""
        return int(cupy.cuda.Device(int(device.partition(":")[2] or 0)).compute_capability)

    def capturing(self) -> bool:
        """Return whether the current stream is captured, see `Runtime.capturing`."""
        try:
            return bool(cupy.cuda.get_current_stream().is_capturing())
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status != CAPTURE_IMPLICIT:
                raise
            return True  # querying the default stream is an error while another is captured

    def compile(self, code: str, name: str, shared: int = 0) -> Kernel:
        """Compile by NVRTC, unless the kernel was compiled before, see `Runtime.compile`."""
        cubin = cubins.find(code, name, f"sm_{cupy.cuda.Device().compute_capability}")
        if cubin is None:  # CuPy caches the binary on disk
            module = cupy.RawModule(code=code, options=OPTIONS, name_expressions=(name,))
            function: Any = module.get_function(name)
        else:
            function = cupy.RawModule(path=str(cubin.path)).get_function(cubin.symbol)
        if shared > SHARED:
            function.max_dynamic_shared_size_bytes = shared
        kernel: Kernel = function
        return kernel

    def address(self, array: Any) -> int:
        """Return the address of an array, see `Runtime.address`."""
        return int(array.data.ptr)

    def structure(self, value: Any, arrays: Mapping[int, Any]) -> Any:
        """Return a structure with the addresses of the arrays, see `Runtime.structure`."""
        structure = np.frombuffer(bytearray(value.tobytes()), value.dtype)
        members = structure.view(np.uint64)
        for at, array in arrays.items():
            members[at // 8] = array.data.ptr
        return structure[0]

    def usage(self, kernel: Any) -> Usage:
        """Return the resources of a kernel, see `Runtime.usage`."""
        return Usage(kernel.num_regs, kernel.max_threads_per_block, kernel.shared_size_bytes)

    def limits(self) -> Limits:
        """Return the limits of the current device, see `Runtime.limits`."""
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
        """Return why the backend cannot run a call, see `Backend.refusals`."""
        reasons = super().refusals(request)
        count, why = _devices()
        if not count:
            reasons.append(f"CuPy {cupy.__version__} sees no CUDA device{why}")
        if request.dtype == "float32" and os.environ.get("CUPY_TF32", "0") == "1":
            reasons.append("float32 inputs: CUPY_TF32=1 sets matrix products to TF32; unset it")
        return reasons

    def exchange(self, array: Any, device: str | None = None) -> Any:
        """Convert an array: by DLPack on a GPU, by a copy from or to the host."""
        if device == "cpu":
            return cupy.asnumpy(array)
        library = library_of(array, "array")
        index = 0 if device is None else int(device.partition(":")[2] or 0)
        there = library != "cupy" and device_name(array, library) == f"cuda:{index}"
        if device is None or there:
            half = dtype_name(array) == "bfloat16"
            with self.stream_of(array):
                # CuPy's DLPack has no bfloat16, so the array is passed as integers.
                result = cupy.from_dlpack(_bits(array) if half else array)
                return result.view(_bfloat16()) if half else result
        with cupy.cuda.Device(index):
            # `asarray` copies from the host and from another GPU, which `from_dlpack` refuses.
            return cupy.asarray(array)

    def give(self, array: Any, namespace: Any) -> Any:
        """Convert a result to an array of another library, see `Backend.give`."""
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
        """Return the versions of CuPy and of the CUDA runtime."""
        versions = {"cupy": str(cupy.__version__)}
        if _devices()[0]:
            versions["cuda"] = str(cupy.cuda.runtime.runtimeGetVersion())
        return versions


class _Stream(NamedTuple):
    """A stream with `__cuda_stream__`, which streams of some versions of PyTorch lack."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def _stream(pointer: int) -> Any:
    """Return the stream of the current device at a pointer; 0 is the default stream."""
    if not pointer:
        return cupy.cuda.Stream.null
    return cupy.cuda.Stream.from_external(_Stream(pointer))


def _bits(array: Any) -> Any:
    """Return a 16-bit array of PyTorch or JAX viewed as integers."""
    return array.view(sys.modules[library_of(array, "array")].__dict__.get("int16", "int16"))


def _bfloat16() -> Any:
    """Return the dtype bfloat16, which CuPy takes from ml_dtypes."""
    import ml_dtypes

    return ml_dtypes.bfloat16


def _devices() -> tuple[int, str]:
    """Return the number of CUDA devices, and the error of CUDA if it reports one."""
    try:
        return int(cupy.cuda.runtime.getDeviceCount()), ""
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return 0, f": {error}"
