"""CuPy as an array library of the suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from .base import Array, Framework, Memory, has_own_elements, with_strides_kept

__all__ = ["CupyFramework"]


class CupyFramework(Framework):
    """CuPy, on CUDA devices."""

    poisons: ClassVar[bool] = True

    def devices(self) -> list[str]:
        """List the CUDA devices."""
        cuda = self.module.cuda
        try:
            count = cuda.runtime.getDeviceCount()
        except cuda.runtime.CUDARuntimeError:  # no driver, or no device
            count = 0
        return [f"cuda:{i}" for i in range(count)]

    def available(self, device: str = "cuda") -> str | None:
        """Return why nothing can run on a device of this machine."""
        if device.partition(":")[0] == "cpu":
            return self.unimportable() or "cupy runs on CUDA devices only"
        return super().available(device)

    def versions(self) -> dict[str, str]:
        """Return the versions of CuPy and of its CUDA runtime."""
        cupy = self.module
        versions = {"cupy": str(cupy.__version__)}
        if self.devices():
            versions["cupy cuda"] = str(cupy.cuda.runtime.runtimeGetVersion())
        return versions

    def has_dtype(self, name: str) -> bool:
        """Return whether CuPy has a dtype; bfloat16 is that of ml_dtypes, since CuPy 14."""
        if name != "bfloat16":
            return super().has_dtype(name)
        try:
            from ml_dtypes import bfloat16

            self.module.empty(0, bfloat16)
        except Exception:  # noqa: BLE001 - no ml_dtypes, an older CuPy, or no device
            return False
        return True

    def asarray(self, x: Array, device: str = "cuda") -> Any:
        """Copy an array to a device, with its strides."""
        cupy = self.module
        buffer, _, start = with_strides_kept(x)
        with cupy.cuda.Device(_index(device)):
            flat = cupy.asarray(buffer)
            memory = flat.data + start * x.dtype.itemsize
            return cupy.ndarray(x.shape, x.dtype, memory, x.strides)

    def asnumpy(self, x: Any) -> Array:
        """Copy an array to NumPy."""
        return np.asarray(self.module.asnumpy(x))

    def is_writeable(self, x: Any) -> bool:
        """Return whether every element of an array has memory of its own."""
        return has_own_elements(x.shape, x.strides)

    def shares_memory(self, x: Any, y: Any) -> bool:
        """Return whether the memory of two arrays overlaps."""
        return bool(self.module.may_share_memory(x, y))

    def overwrite(self, x: Any, values: Array) -> bool:
        """Replace the values of an array in place."""
        x[...] = self.asarray(values, self.device_of(x))
        return True

    def synchronize(self, result: Any = None) -> None:
        """Wait for the devices."""
        cuda = self.module.cuda
        for name in self.devices():
            cuda.Device(_index(name)).synchronize()

    def release(self) -> None:
        """Free the unused blocks of the memory pool."""
        self.module.get_default_memory_pool().free_all_blocks()

    def policy(self) -> str:
        """Describe how CuPy computes, which only the variable CUPY_TF32 changes."""
        tf32 = os.environ.get("CUPY_TF32", "0")
        text = "TF32, by CUPY_TF32" if tf32 == "1" else "IEEE float32, no TF32 (CUPY_TF32 unset)"
        return f"float32 matrix products in {text}; float64 in float64"

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Set every bit of the memory that CuPy allocates, which makes floats NaN."""
        cuda = self.module.cuda
        before = cuda.get_allocator()

        def allocate(size: int) -> Any:
            memory = before(size)
            memory.memset_async(0xFF, size)
            return memory

        cuda.set_allocator(allocate)
        try:
            yield
        finally:
            cuda.set_allocator(before)

    @contextmanager
    def unpooled(self) -> Iterator[None]:
        """Allocate each array by CUDA itself, see `Framework.unpooled`."""
        cuda = self.module.cuda
        before = cuda.get_allocator()
        cuda.set_allocator(None)
        try:
            yield
        finally:
            cuda.set_allocator(before)

    def seconds(self, call: Callable[[], Any], repeat: int, device: str = "cuda") -> float:
        """Return the seconds between two CUDA events around the calls, per call."""
        cuda = self.module.cuda
        start, end = cuda.Event(), cuda.Event()
        start.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        return float(cuda.get_elapsed_time(start, end)) / 1e3 / repeat

    def memory(self, device: str) -> Memory | None:
        """Return a `Memory` that counts the blocks of the pool as they are allocated and freed."""
        return _PoolMemory(self)

    def gpu(self, device: str) -> dict[str, Any] | None:
        """Describe a CUDA device."""
        properties = self.module.cuda.runtime.getDeviceProperties(_index(device))
        return {
            "name": properties["name"].decode(),
            "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
            "driver": None,
            "capability": f"{properties['major']}.{properties['minor']}",
        }


class _PoolMemory(Memory):
    """The peak of CuPy's memory pool, counted by a memory hook."""

    def __init__(self, framework: CupyFramework) -> None:
        self.framework = framework
        self.hook: Any = None

    def reset(self) -> None:
        from cupy.cuda.memory_hook import MemoryHook

        class Count(MemoryHook):  # type: ignore[misc]
            name = "PeakOfPdcore"

            def __init__(self) -> None:
                self.now, self.peak = 0, 0

            def malloc_postprocess(self, **block: Any) -> None:
                self.now += block["mem_size"]
                self.peak = max(self.peak, self.now)

            def free_postprocess(self, **block: Any) -> None:
                self.now -= block["mem_size"]

        self._remove_hook()
        self.framework.synchronize()
        self.hook = Count()
        self.hook.__enter__()

    def read(self) -> int | None:
        if self.hook is None:
            return None
        self.framework.synchronize()
        peak = int(self.hook.peak)
        self._remove_hook()
        return peak

    def _remove_hook(self) -> None:
        if self.hook is not None:
            self.hook.__exit__()
            self.hook = None


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)
