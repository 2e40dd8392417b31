"""JAX as an array library of the suite."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .base import Array, Arrays, Framework, Function, Memory

__all__ = ["JaxFramework"]

#: Uses of `JaxFramework.precision` after which compiled programs are freed. On the CPU each program
#: holds about a hundred of the 65,530 memory maps that Linux allows a process.
CLEARING = 100
#: The number of shards of a sequence.
SHARDS = 4


class JaxFramework(Framework):
    """JAX on all of its platforms; its platform ``gpu`` is called ``cuda``, as in pdcore.

    Every function runs as one program (`jax.jit`), because JAX takes longer to dispatch and to
    compile operations one by one.
    """

    _uses = 0
    transformations: ClassVar[frozenset[str]] = frozenset(
        {"autodiff", "double_backward", "vmap", "jvp", "compile"}
    )

    shards_by: ClassVar[str] = "axis_name"
    compiles: ClassVar[bool] = True

    @cached_property
    def xp(self) -> Any:
        """jax.numpy, which is an array-API namespace itself."""
        return self.module.numpy

    def devices(self) -> list[str]:
        """List the devices, those of the default platform first."""
        return list(self._devices())

    def _devices(self) -> dict[str, Any]:
        devices: dict[str, Any] = {}
        for device in (*self.module.devices(), *self.module.devices("cpu")):
            kind = "cuda" if device.platform == "gpu" else device.platform
            name = "cpu" if kind == "cpu" else f"{kind}:{device.id}"
            devices.setdefault(name, device)
        return devices

    def versions(self) -> dict[str, str]:
        """Return the versions of JAX and of its compiler."""
        compiler = importlib.import_module("jaxlib").__version__
        return {"jax": str(self.module.__version__), "jaxlib": str(compiler)}

    def asarray(self, x: Array, device: str = "cpu") -> Any:
        """Copy an array; JAX has no strides, and has int64 only where 64 bits are enabled."""
        jax = self.module
        if not jax.config.jax_enable_x64:
            if x.dtype == np.float64:
                raise TypeError("JAX has float64 only under precision('float64')")
            if x.dtype == np.int64:
                x = x.astype(np.int32)
        target = next(
            d
            for name, d in self._devices().items()
            if name == device or name.partition(":")[0] == device
        )
        return jax.device_put(np.array(x), target)

    def asnumpy(self, x: Any) -> Array:
        """Convert an array to NumPy."""
        return np.asarray(x)

    def synchronize(self, result: Any = None) -> None:
        """Wait for a result, or for all dispatched work."""
        if result is None:
            self.module.effects_barrier()
            result = self.module.live_arrays()
        self.module.block_until_ready(result)

    def release(self) -> None:
        """Free compiled programs."""
        self.module.clear_caches()

    @contextmanager
    def precision(self, dtype: str) -> Iterator[None]:
        """Enable 64 bits for float64, and compute matrix products in the highest precision."""
        config = self.module.config
        before = config.jax_enable_x64, config.jax_default_matmul_precision
        config.update("jax_enable_x64", dtype == "float64")
        config.update("jax_default_matmul_precision", "highest")
        try:
            yield
        finally:
            config.update("jax_enable_x64", before[0])
            config.update("jax_default_matmul_precision", before[1])
            self._uses += 1
            if self._uses % CLEARING == 0:
                self.release()

    def policy(self) -> str:
        """Describe how JAX computes under `precision`."""
        return (
            "matrix products at precision 'highest' (float32 without TF32); float64 with "
            "jax_enable_x64, which is off for the other dtypes"
        )

    def vjp(
        self, function: Function, arrays: Arrays, cotangents: tuple[Any, Any]
    ) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Compute gradients by jax.vjp."""
        return self.module.jit(self._pullback(function))(  # type: ignore[no-any-return]
            dict(arrays), cotangents
        )

    def recorded(self, function: Function, arrays: Arrays) -> tuple[Any, Any]:
        """Compute (out, lse) as jax.vjp does."""
        jax = self.module
        return jax.jit(lambda x: jax.vjp(function, x)[0])(dict(arrays))  # type: ignore[no-any-return]

    def _pullback(self, function: Function) -> Any:
        """Return a function from arrays and cotangents to (outputs, gradients)."""
        jax = self.module

        def pull(arrays: Any, cotangents: Any) -> Any:
            outputs, pullback = jax.vjp(function, arrays)
            filled = tuple(
                jax.numpy.zeros_like(y) if d is None and y is not None else d
                for y, d in zip(outputs, cotangents, strict=True)
            )
            return outputs, pullback(filled)[0]

        return pull

    def double_vjp(
        self, function: Function, arrays: Arrays, cotangents: tuple[Any, Any], directions: Arrays
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compute gradients by jax.vjp, and their gradients by jax.vjp of that."""
        jax, pull = self.module, self._pullback(function)

        def both(arrays: Any, cotangents: Any, directions: Any) -> Any:
            first, pullback = jax.vjp(lambda x: pull(x, cotangents)[1], arrays)
            return first, pullback(directions)[0]

        return jax.jit(both)(  # type: ignore[no-any-return]
            dict(arrays), cotangents, {name: directions[name] for name in arrays}
        )

    def jvp(
        self, function: Function, arrays: Arrays, directions: Arrays
    ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Compute directional derivatives by jax.jvp."""
        jax = self.module
        tangents = {n: directions.get(n, jax.numpy.zeros_like(x)) for n, x in arrays.items()}
        return jax.jit(lambda x, d: jax.jvp(function, (x,), (d,)))(  # type: ignore[no-any-return]
            dict(arrays), tangents
        )

    def vmap(self, function: Function) -> Function:
        """Map a function by jax.vmap."""
        mapped = self.module.jit(self.module.vmap(function))
        return lambda arrays: tuple(mapped(dict(arrays)))

    def shard(self, name: str, spec: str, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        """Run a call with the sequence in four shards, and concatenate the results of the shards.

        With four devices this uses `jax.shard_map`, with fewer `jax.vmap` with an axis name.
        """
        jax = self.module
        layer = importlib.import_module("pdcore").bind(spec, backend=name)
        platform = next(iter(q.devices())).platform
        devices = jax.devices("cuda" if platform == "gpu" else platform)

        def local(q: Any, k: Any, v: Any) -> Any:
            return tuple(layer(q, k, v, return_lse=True, axis_name="sequence"))

        if len(devices) >= SHARDS:
            mesh = jax.sharding.Mesh(devices[:SHARDS], ("sequence",))
            split = jax.sharding.PartitionSpec(None, None, "sequence")
            mapped = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split)
            place = jax.sharding.NamedSharding(mesh, split)
            out, lse = jax.jit(mapped)(*(jax.device_put(x, place) for x in (q, k, v)))
            return jax.device_put((out, lse), q.sharding)  # type: ignore[no-any-return]

        def split_sequence(x: Any) -> Any:
            *lead, length, dim = x.shape
            return jax.numpy.reshape(x, (*lead, SHARDS, length // SHARDS, dim))

        mapped = jax.vmap(local, in_axes=-3, out_axes=2, axis_name="sequence")
        out, lse = jax.jit(mapped)(split_sequence(q), split_sequence(k), split_sequence(v))
        shape = (*q.shape[:-1], v.shape[-1])
        return jax.numpy.reshape(out, shape), jax.numpy.reshape(lse, shape[:-1])

    def compile(self, function: Function) -> Function:
        """Compile a function by jax.jit."""
        compiled = self.module.jit(function)
        return lambda arrays: tuple(compiled(dict(arrays)))

    def prepared(self, function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
        """Compile a function by jax.jit."""
        compiled = self.module.jit(function)
        return lambda arrays: compiled(dict(arrays))

    def step(
        self, function: Callable[[Arrays], Any]
    ) -> Callable[[Arrays, Any], tuple[Any, dict[str, Any]]]:
        """Compile the result and the gradients together by jax.jit."""
        jax = self.module

        def run(arrays: Any, cotangent: Any) -> Any:
            out, pullback = jax.vjp(function, arrays)
            return out, pullback(cotangent)[0]

        compiled = jax.jit(run)
        return lambda arrays, cotangent: compiled(dict(arrays), cotangent)

    def seconds(self, call: Callable[[], Any], repeat: int, device: str = "cpu") -> float:
        """Return the seconds until the last of the calls, which a GPU runs in order, is done."""
        if not device.startswith("cuda"):
            return super().seconds(call, repeat, device)
        self.synchronize()
        started = time.perf_counter()
        results = [call() for _ in range(repeat)]
        self.finish(results[-1])
        return (time.perf_counter() - started) / repeat

    def memory(self, device: str) -> Memory | None:
        """Return a `Memory` of a device whose allocator has statistics, which a CPU's has not."""
        target = self._devices().get(device if ":" in device or device == "cpu" else f"{device}:0")
        if target is None or target.memory_stats() is None:
            return None
        return _DeviceMemory(self, target)

    def gpu(self, device: str) -> dict[str, Any] | None:
        """Describe a GPU."""
        if not device.startswith("cuda"):
            return None
        target = self._devices()[device if ":" in device else f"{device}:0"]
        limit = (target.memory_stats() or {}).get("bytes_limit")
        return {
            "name": target.device_kind,
            "memory_gib": None if limit is None else round(limit / 2**30, 1),
            "driver": None,
            "capability": getattr(target, "compute_capability", None),
        }


class _DeviceMemory(Memory):
    """The peak memory of the process, which cannot be reset."""

    def __init__(self, framework: JaxFramework, device: Any) -> None:
        self.framework, self.device = framework, device
        self.before, self.peak = 0, 0

    def reset(self) -> None:
        self.framework.synchronize()
        stats = self.device.memory_stats()
        self.before, self.peak = stats["bytes_in_use"], stats["peak_bytes_in_use"]

    def read(self) -> int | None:
        self.framework.synchronize()
        peak = self.device.memory_stats()["peak_bytes_in_use"]
        return int(peak - self.before) if peak > self.peak else None
