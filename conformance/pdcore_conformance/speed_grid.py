"""What the bench times, and what is promised of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .peers import Workload

__all__ = [
    "GROWTH",
    "Target",
    "Targets",
    "half_pooled",
    "lengths",
    "long_shape",
    "targets",
    "workloads",
]

Shape = tuple[int, int, int, int]
#: At least, at most.
Target = tuple[float | None, float | None]

BOTH = ("forward", "forward+backward")


def half_pooled(heads: int) -> str:
    """Give Attention-SH with half of the heads at scale 2."""
    return f"sh({','.join('1' * (heads // 2) + '2' * (heads - heads // 2))})"


_CPU: Mapping[str, tuple[Workload, ...]] = {
    "quick": (
        Workload("softmax", (1, 8, 1024, 64)),
        Workload("softmax", (1, 8, 1024, 64), direction=BOTH[1]),
        Workload("softmax", (8, 8, 512, 64)),
        Workload("bn", (1, 8, 1024, 64)),
    ),
    "full": (
        *(Workload("softmax", shape) for shape in (
            (1, 8, 4096, 64), (1, 8, 1024, 64), (8, 8, 512, 64), (32, 8, 128, 64))),
        *(Workload(spec, (1, 8, 4096, 64), direction=BOTH[1]) for spec in ("softmax", "bn")),
        Workload("causal", (1, 8, 4096, 64)),
        Workload("bn", (1, 8, 4096, 64)),
    ),
}  # fmt: skip
_CUDA: Mapping[str, tuple[Workload, ...]] = {
    "quick": tuple(
        Workload(spec, (2, 16, 4096, 64), dtype, direction)
        for dtype in ("bfloat16", "float16", "float32")
        for spec in ("softmax", "causal", "bn")
        for direction in BOTH
        if dtype != "float16" or spec == "softmax"
    ),
    "full": tuple(
        Workload(spec, shape, dtype, direction)
        for dtype in ("bfloat16", "float16", "float32")
        for shape in ((2, 16, 4096, 64), (2, 16, 4096, 128), (8, 16, 1024, 64), (1, 16, 16384, 64))
        for spec in ("softmax", "causal", "bn")
        for direction in BOTH
    ),
}


class Targets(NamedTuple):
    """What is promised of a backend on a device, at full length.

    Attributes
    ----------
    ratios : mapping of (spec, shape) to number
        Times as fast as the fastest peer of its library, at least.
    specs : mapping of str to number
        Times as fast as softmax, at least.
    linear : number
        Times as fast as softmax that linear attention is at the longest sequence, at least.
    memory_mib : number
        Of a softmax call at the longest sequence, at most.
    attention_us, bound_us : number
        Overhead of a call, at most.
    import_ratio : number
        The time of ``import pdcore`` over that of ``import numpy``, at most.
    """

    ratios: Mapping[tuple[str, Shape], float]
    specs: Mapping[str, float]
    linear: float
    memory_mib: float
    attention_us: float
    bound_us: float
    import_ratio: float


_TARGETS: Mapping[str, Targets] = {
    "numpy:cpu": Targets(
        ratios={
            ("softmax", (1, 8, 4096, 64)): 1.5, ("softmax", (1, 8, 1024, 64)): 1.0,
            ("softmax", (8, 8, 512, 64)): 1.0, ("softmax", (32, 8, 128, 64)): 1.0,
        },
        # bn in 1.10 of softmax's time, half of the heads pooled by 2 in 0.80 of it.
        specs={"bn": 1 / 1.10, half_pooled(8): 1 / 0.80},
        linear=50.0, memory_mib=64.0, attention_us=20.0, bound_us=8.0, import_ratio=1.5,
    ),
}  # fmt: skip

#: Growth of time from N to 4 N, wherever it is measured at full length.
GROWTH: Mapping[str, Target] = {"softmax": (13.0, 18.0), "linear": (3.4, 5.0)}


def targets(backend: str, device: str) -> Targets | None:
    """Give what is promised of a backend; others are reported without a verdict."""
    return _TARGETS.get(f"{backend}:{device.partition(':')[0]}")


def workloads(device: str, grid: str) -> tuple[Workload, ...]:
    """Give what is timed against peers."""
    return (_CUDA if device.startswith("cuda") else _CPU)[grid]


def long_shape(device: str, grid: str) -> Shape:
    """Give the longest sequence: of the memory, of softmax, and the shortest of linear."""
    heads, dim = (16, 64) if device.startswith("cuda") else (8, 64)
    return (1, heads, 16384 if grid == "full" else 4096, dim)


def lengths(spec: str, length: int) -> list[int]:
    """Give the lengths of a growth curve, each four times the one before."""
    return [length, 4 * length] if spec == "linear" else [length // 4, length]
