"""PyTorch as an array library of the suite."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .base import Array, Arrays, Framework, Function, Memory, has_own_elements, with_strides_kept

__all__ = ["TorchFramework"]

#: The processes that `TorchFramework.shard` starts.
RANKS = 2

#: The settings under ``torch.backends`` that can lower the precision of float32 matrix products.
_FP32 = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


class TorchFramework(Framework):
    """PyTorch, on the CPU and on CUDA devices."""

    transformations: ClassVar[frozenset[str]] = frozenset(
        {"autodiff", "double_backward", "vmap", "jvp", "compile"}
    )
    poisons: ClassVar[bool] = True
    shards_by: ClassVar[str] = "group"

    def devices(self) -> list[str]:
        """List the CPU and the CUDA devices."""
        torch = self.module
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return ["cpu", *(f"cuda:{i}" for i in range(count))]

    def versions(self) -> dict[str, str]:
        """Return the versions of PyTorch and of its CUDA libraries."""
        torch = self.module
        versions = {"torch": str(torch.__version__)}
        if torch.version.cuda is not None:
            versions["torch cuda"] = str(torch.version.cuda)
            if torch.backends.cudnn.is_available():
                versions["cudnn"] = str(torch.backends.cudnn.version())
        with suppress(ModuleNotFoundError):
            versions["triton"] = str(importlib.import_module("triton").__version__)
        return versions

    def missing(self, feature: str) -> str | None:
        """Return why PyTorch does not have a feature; torch.compile needs a C++ compiler."""
        if feature == "compile" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "torch.compile takes a C++ compiler, and there is none"
        return super().missing(feature)

    def asarray(self, x: Array, device: str = "cpu") -> Any:
        """Copy an array with its strides; one with negative strides becomes contiguous."""
        torch = self.module
        if any(stride < 0 for stride in x.strides):
            x = np.ascontiguousarray(x)
        buffer, strides, start = with_strides_kept(x)
        if x.dtype.name == "bfloat16":
            flat = torch.from_numpy(buffer.view(np.int16)).view(torch.bfloat16)
        else:
            flat = torch.from_numpy(buffer)
        # Copy the buffer and view it: `to` would expand a broadcast array.
        return flat.to(device).as_strided(x.shape, strides, start)

    def asnumpy(self, x: Any) -> Array:
        """Convert a tensor to NumPy, detached."""
        x = x.detach().cpu()
        if x.dtype != self.module.bfloat16:
            return np.asarray(x.numpy())
        from ml_dtypes import bfloat16

        return np.asarray(x.contiguous().view(self.module.int16).numpy()).view(bfloat16)

    def is_writeable(self, x: Any) -> bool:
        """Return whether every element of a tensor has memory of its own."""
        return has_own_elements(x.shape, x.stride())

    def shares_memory(self, x: Any, y: Any) -> bool:
        """Return whether two tensors have one storage."""
        return bool(x.numel()) and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()

    def overwrite(self, x: Any, values: Array) -> bool:
        """Replace the values of a tensor in place."""
        x.copy_(self.asarray(values, self.device_of(x)))
        return True

    def synchronize(self, result: Any = None) -> None:
        """Wait for the CUDA devices."""
        torch = self.module
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)

    def release(self) -> None:
        """Empty the cache of the allocator, and free compiled programs."""
        torch = self.module
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def precision(self, dtype: str) -> Iterator[None]:
        """Disable TF32 and bfloat16 in float32 matrix products."""
        torch = self.module
        settings = [s for name in _FP32 if (s := _setting(torch.backends, name)) is not None]
        if not settings:  # a release without these settings
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        before = [setting.fp32_precision for setting in settings]
        for setting in settings:
            setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            for setting, value in zip(settings, before, strict=True):
                setting.fp32_precision = value

    def policy(self) -> str:
        """Describe how PyTorch computes under `precision`."""
        return (
            "float32 matrix products in IEEE float32, no TF32 "
            "(torch.backends.*.fp32_precision = 'ieee'); float64 in float64"
        )

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Fill the tensors of torch.empty and its variants, in this thread and its backward."""
        torch = self.module
        from torch.utils._python_dispatch import TorchDispatchMode

        aten = torch.ops.aten
        allocators = {
            aten.empty,
            aten.empty_like,
            aten.empty_strided,
            aten.empty_permuted,
            aten.new_empty,
            aten.new_empty_strided,
        }

        class Poison(TorchDispatchMode):  # type: ignore[misc]
            # Without this, code that a backend compiles would run uncompiled under the mode.
            supports_higher_order_operators = True

            @classmethod
            def ignore_compile_internals(cls) -> bool:
                return True

            def __torch_dispatch__(
                self, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                result = function(*args, **(kwargs or {}))
                poisoned = getattr(function, "overloadpacket", None) in allocators
                return _poison(result, torch) if poisoned else result

        with Poison():
            yield

    def vjp(
        self, function: Function, arrays: Arrays, cotangents: tuple[Any, Any]
    ) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Compute gradients by torch.autograd."""
        leaves = _leaves(arrays)
        outputs = function(leaves)
        gradients = self._grad(outputs, cotangents, leaves)
        return _detached(outputs), {n: g.detach() for n, g in gradients.items()}

    def recorded(self, function: Function, arrays: Arrays) -> tuple[Any, Any]:
        """Compute (out, lse) of tensors that require gradients."""
        return _detached(function(_leaves(arrays)))

    def double_vjp(
        self, function: Function, arrays: Arrays, cotangents: tuple[Any, Any], directions: Arrays
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compute gradients with create_graph, and their gradients."""
        torch, leaves = self.module, _leaves(arrays)
        first = self._grad(function(leaves), cotangents, leaves, create_graph=True)
        # A constant gradient has no graph, and its derivative is 0.
        names = [name for name, g in first.items() if g.requires_grad]
        second: Any = (None,) * len(leaves)
        if names:
            second = torch.autograd.grad(
                [first[n] for n in names],
                list(leaves.values()),
                [directions[n] for n in names],
                allow_unused=True,
            )
        return (
            {n: g.detach() for n, g in first.items()},
            {
                n: torch.zeros_like(x) if g is None else g.detach()
                for (n, x), g in zip(leaves.items(), second, strict=True)
            },
        )

    def _grad(
        self,
        outputs: tuple[Any, Any],
        cotangents: tuple[Any, Any],
        leaves: dict[str, Any],
        create_graph: bool = False,
    ) -> dict[str, Any]:
        torch = self.module
        pairs = [
            (y, d)
            for y, d in zip(outputs, cotangents, strict=True)
            if d is not None and y.requires_grad
        ]
        gradients: Any = (None,) * len(leaves)
        if pairs:
            gradients = torch.autograd.grad(
                [y for y, _ in pairs],
                list(leaves.values()),
                [d for _, d in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        return {
            n: torch.zeros_like(x) if g is None else g
            for (n, x), g in zip(leaves.items(), gradients, strict=True)
        }

    @cached_property
    def _forward_mode(self) -> Any:
        """PyTorch with forward mode loaded, which uses functions that PyTorch deprecates."""
        torch = self.module
        with _torch_deprecations_ignored():
            torch.func.jvp(torch.exp, (torch.zeros(()),), (torch.zeros(()),))
        return torch

    def jvp(
        self, function: Function, arrays: Arrays, directions: Arrays
    ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Compute directional derivatives by torch.func.jvp."""
        torch = self._forward_mode
        tangents = {n: directions.get(n, torch.zeros_like(x)) for n, x in arrays.items()}
        outputs, derivatives = torch.func.jvp(function, (dict(arrays),), (tangents,))
        return outputs, derivatives

    def vmap(self, function: Function) -> Function:
        """Map a function by torch.func.vmap."""
        mapped = self.module.func.vmap(function)
        return lambda arrays: tuple(mapped(dict(arrays)))

    def shard(self, name: str, spec: str, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        """Run a call with the sequence cut over two processes, and concatenate their results."""
        torch = self.module
        with tempfile.TemporaryDirectory() as folder:
            torch.save((name, spec, q, k, v), Path(folder, "call"))
            command = [sys.executable, "-m", f"{__package__}.torch_rank", folder, str(RANKS)]
            ranks = [
                subprocess.Popen(
                    [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
                for rank in range(RANKS)
            ]
            said = [rank.communicate()[0].decode(errors="replace") for rank in ranks]
            failed = [i for i, rank in enumerate(ranks) if rank.returncode]
            if failed:
                raise RuntimeError(f"rank {failed[0]} of {RANKS} failed: {said[failed[0]][-2000:]}")
            parts = [torch.load(Path(folder, f"rank_{i}")) for i in range(RANKS)]
        return torch.cat([out for out, _ in parts], -2), torch.cat([lse for _, lse in parts], -1)

    def compile(self, function: Function) -> Function:
        """Compile a function by torch.compile, without graph breaks."""
        # Every case compiles the same code, and PyTorch limits the programs for one code object.
        self.module.compiler.reset()
        compiled = self.module.compile(function, fullgraph=True)

        def call(arrays: Arrays) -> tuple[Any, Any]:
            with _torch_deprecations_ignored():
                return tuple(compiled(dict(arrays)))

        return call

    def step(
        self, function: Callable[[Arrays], Any]
    ) -> Callable[[Arrays, Any], tuple[Any, dict[str, Any]]]:
        """Return a function that computes out and the gradients by torch.autograd."""
        torch = self.module

        def run(arrays: Arrays, cotangent: Any) -> tuple[Any, dict[str, Any]]:
            leaves = _leaves(arrays)
            out = function(leaves)
            gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
            return out.detach(), dict(zip(leaves, gradients, strict=True))

        return run

    def seconds(self, call: Callable[[], Any], repeat: int, device: str = "cpu") -> float:
        """Return the seconds between two CUDA events around the calls, per call."""
        if not device.startswith("cuda"):
            return super().seconds(call, repeat, device)
        start, end = (self.module.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeat

    def memory(self, device: str) -> Memory | None:
        """Return a `Memory` of a CUDA device, by the statistics of the caching allocator."""
        return _CudaMemory(self.module, device) if device.startswith("cuda") else None

    def gpu(self, device: str) -> dict[str, Any] | None:
        """Describe a CUDA device."""
        if not device.startswith("cuda"):
            return None
        properties = self.module.cuda.get_device_properties(device)
        return {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": None,
            "capability": f"{properties.major}.{properties.minor}",
        }


class _CudaMemory(Memory):
    """The peak memory that PyTorch's caching allocator reports."""

    def __init__(self, torch: Any, device: str) -> None:
        self.cuda, self.device, self.before = torch.cuda, device, 0

    def reset(self) -> None:
        self.cuda.synchronize(self.device)
        self.cuda.reset_peak_memory_stats(self.device)
        self.before = self.cuda.memory_allocated(self.device)

    def read(self) -> int | None:
        self.cuda.synchronize(self.device)
        return int(self.cuda.max_memory_allocated(self.device)) - self.before


@contextmanager
def _torch_deprecations_ignored() -> Iterator[None]:
    """Ignore the deprecation warnings that PyTorch's own code causes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        yield


def _setting(backends: Any, name: str) -> Any:
    """Return an object with an `fp32_precision`, None where this release has none."""
    for part in name.split("."):
        backends = getattr(backends, part, None)
    return backends if hasattr(backends, "fp32_precision") else None


def _leaves(arrays: Arrays) -> dict[str, Any]:
    return {name: x.detach().requires_grad_() for name, x in arrays.items()}


def _detached(outputs: tuple[Any, Any]) -> tuple[Any, Any]:
    out, lse = outputs
    return out.detach(), None if lse is None else lse.detach()


def _poison(x: Any, torch: Any) -> Any:
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return x.fill_(float("nan"))
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)
