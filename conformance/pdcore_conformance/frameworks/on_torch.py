"""PyTorch."""

from __future__ import annotations

import importlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .base import Array, Arrays, Framework, Function, Memory, with_strides_kept

__all__ = ["TorchFramework"]

#: The switches that let a float32 matrix product be computed in less, and how they are shut.
_FP32 = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


class TorchFramework(Framework):
    """PyTorch, on the CPU and on CUDA devices."""

    transformations: ClassVar[frozenset[str]] = frozenset(
        {"autodiff", "double_backward", "vmap", "jvp", "compile"}
    )
    poisons: ClassVar[bool] = True

    def devices(self) -> list[str]:
        """Name the devices: the CPU, and the CUDA devices."""
        torch = self.module
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return ["cpu", *(f"cuda:{i}" for i in range(count))]

    def versions(self) -> dict[str, str]:
        """Give the versions of PyTorch and of its CUDA libraries."""
        torch = self.module
        found = {"torch": str(torch.__version__)}
        if torch.version.cuda is not None:
            found["torch cuda"] = str(torch.version.cuda)
            if torch.backends.cudnn.is_available():
                found["cudnn"] = str(torch.backends.cudnn.version())
        with suppress(ModuleNotFoundError):
            found["triton"] = str(importlib.import_module("triton").__version__)
        return found

    def missing(self, feature: str) -> str | None:
        """Say why a feature cannot be had; torch.compile takes a compiler."""
        if feature == "compile" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "torch.compile takes a C++ compiler, and there is none"
        return super().missing(feature)

    def asarray(self, x: Array, device: str = "cpu") -> Any:
        """Copy an array; strides of 0 and of more than the row are kept, negative ones not."""
        torch = self.module
        if any(stride < 0 for stride in x.strides):
            x = np.ascontiguousarray(x)
        buffer, strides, start = with_strides_kept(x)
        if x.dtype.name == "bfloat16":
            flat = torch.from_numpy(buffer.view(np.int16)).view(torch.bfloat16)
        else:
            flat = torch.from_numpy(buffer)
        # The buffer moves as it is: `to` would make a broadcast array whole.
        return flat.to(device).as_strided(x.shape, strides, start)

    def asnumpy(self, x: Any) -> Array:
        """Bring a tensor to NumPy, detached."""
        x = x.detach().cpu()
        if x.dtype != self.module.bfloat16:
            return np.asarray(x.numpy())
        from ml_dtypes import bfloat16

        return np.asarray(x.contiguous().view(self.module.int16).numpy()).view(bfloat16)

    def synchronize(self, result: Any = None) -> None:
        """Wait for the CUDA devices."""
        torch = self.module
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)

    def release(self) -> None:
        """Empty the allocator's cache, and forget compiled programs."""
        torch = self.module
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def precision(self, dtype: str) -> Iterator[None]:
        """Shut the switches that let float32 matrix products run in TF32 or bfloat16."""
        torch = self.module
        switches = [s for name in _FP32 if (s := _switch(torch.backends, name)) is not None]
        if not switches:  # a release from before the switches by backend
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        kept = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, value in zip(switches, kept, strict=True):
                switch.fp32_precision = value

    def policy(self) -> str:
        """Say how PyTorch computes under `precision`."""
        return (
            "float32 matrix products in IEEE float32, no TF32 "
            "(torch.backends.*.fp32_precision = 'ieee'); float64 in float64"
        )

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Fill what torch.empty and its relatives give, in this thread and its backward."""
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
            # What a backend compiles stays compiled: under another mode it would not be.
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
        """Pull back by torch.autograd."""
        leaves = _leaves(arrays)
        outputs = function(leaves)
        gradients = self._grad(outputs, cotangents, leaves)
        return _detached(outputs), {n: g.detach() for n, g in gradients.items()}

    def double_vjp(
        self, function: Function, arrays: Arrays, cotangents: tuple[Any, Any], directions: Arrays
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Pull back with create_graph, and again."""
        torch, leaves = self.module, _leaves(arrays)
        first = self._grad(function(leaves), cotangents, leaves, create_graph=True)
        # A gradient that depends on nothing has no graph, and its derivative is 0.
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
        found: Any = (None,) * len(leaves)
        if pairs:
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                list(leaves.values()),
                [d for _, d in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        return {
            n: torch.zeros_like(x) if g is None else g
            for (n, x), g in zip(leaves.items(), found, strict=True)
        }

    @cached_property
    def _forward_mode(self) -> Any:
        """PyTorch with forward mode loaded, whose rules use what PyTorch itself deprecates."""
        torch = self.module
        with _own_deprecations_ignored():
            torch.func.jvp(torch.exp, (torch.zeros(()),), (torch.zeros(()),))
        return torch

    def jvp(
        self, function: Function, arrays: Arrays, directions: Arrays
    ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Push forward by torch.func.jvp."""
        torch = self._forward_mode
        tangents = {n: directions.get(n, torch.zeros_like(x)) for n, x in arrays.items()}
        outputs, derivatives = torch.func.jvp(function, (dict(arrays),), (tangents,))
        return outputs, derivatives

    def vmap(self, function: Function) -> Function:
        """Map by torch.func.vmap."""
        mapped = self.module.func.vmap(function)
        return lambda arrays: tuple(mapped(dict(arrays)))

    def compile(self, function: Function) -> Function:
        """Compile by torch.compile, without graph breaks."""
        # Every case makes a program of the same code, and one code has a limit of programs.
        self.module.compiler.reset()
        compiled = self.module.compile(function, fullgraph=True)

        def call(arrays: Arrays) -> tuple[Any, Any]:
            with _own_deprecations_ignored():
                return tuple(compiled(dict(arrays)))

        return call

    def step(
        self, function: Callable[[Arrays], Any]
    ) -> Callable[[Arrays, Any], tuple[Any, dict[str, Any]]]:
        """Run forward and backward by torch.autograd."""
        torch = self.module

        def run(arrays: Arrays, cotangent: Any) -> tuple[Any, dict[str, Any]]:
            leaves = _leaves(arrays)
            out = function(leaves)
            found = torch.autograd.grad(out, list(leaves.values()), cotangent)
            return out.detach(), dict(zip(leaves, found, strict=True))

        return run

    def memory(self, device: str) -> Memory | None:
        """Give the meter of a CUDA device: the caching allocator's."""
        return _CudaMemory(self.module, device) if device.startswith("cuda") else None

    def gpu(self, device: str) -> dict[str, Any] | None:
        """Describe a CUDA device."""
        if not device.startswith("cuda"):
            return None
        found = self.module.cuda.get_device_properties(device)
        return {
            "name": found.name,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "driver": None,
            "capability": f"{found.major}.{found.minor}",
        }


class _CudaMemory(Memory):
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
def _own_deprecations_ignored() -> Iterator[None]:
    """Ignore what PyTorch itself uses of what it deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
        yield


def _switch(backends: Any, name: str) -> Any:
    """Find a switch that has an `fp32_precision`, None where this release has not."""
    for part in name.split("."):
        backends = getattr(backends, part, None)
    return backends if hasattr(backends, "fp32_precision") else None


def _leaves(arrays: Arrays) -> dict[str, Any]:
    return {name: x.detach().requires_grad_() for name, x in arrays.items()}


def _detached(outputs: tuple[Any, Any]) -> tuple[Any, Any]:
    out, lse = outputs
    return out.detach(), lse.detach()


def _poison(x: Any, torch: Any) -> Any:
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return x.fill_(float("nan"))
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)
