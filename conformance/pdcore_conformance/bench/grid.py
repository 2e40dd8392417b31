"""The workloads that the bench times, and the targets of each backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .workload import DIRECTIONS, Shape, Workload, half_pooled

__all__ = [
    "GROWTH",
    "Target",
    "Targets",
    "lengths",
    "long_shape",
    "targets",
    "workloads",
]

#: The least and the greatest value that meet a target; None for no limit.
Target = tuple[float | None, float | None]

_SHAPES = (1, 8, 4096, 64), (1, 8, 1024, 64), (8, 8, 512, 64), (32, 8, 128, 64)
_CPU: Mapping[str, tuple[Workload, ...]] = {
    "quick": (
        Workload("softmax", (1, 8, 1024, 64)),
        Workload("softmax", (1, 8, 1024, 64), direction=DIRECTIONS[1]),
        Workload("softmax", (8, 8, 512, 64)),
        Workload("bn", (1, 8, 1024, 64)),
    ),
    "full": (
        *(Workload("softmax", shape) for shape in _SHAPES),
        *(Workload(spec, (1, 8, 4096, 64), direction=DIRECTIONS[1]) for spec in ("softmax", "bn")),
        Workload("causal", (1, 8, 4096, 64)),
        Workload("bn", (1, 8, 4096, 64)),
    ),
}
_SOFTMAX_LIKE = tuple(
    Workload(spec, shape, direction=direction)
    for shape in _SHAPES
    for spec in ("softmax", "bn", half_pooled(8), "causal", "causal+bn(statistics=prefix)")
    for direction in DIRECTIONS
)
#: The workloads of a backend on the full grid that has other workloads than `_CPU` there.
_BY_TARGET: Mapping[str, tuple[Workload, ...]] = {
    "jax:cpu": _SOFTMAX_LIKE,
    "torch:cpu": (
        *_SOFTMAX_LIKE,
        Workload("bn(with_std=false)", (1, 8, 4096, 64)),
        *(
            Workload(spec, (1, 8, 4096, 64), direction=direction)
            for spec in ("linear", "causal+linear")
            for direction in DIRECTIONS
        ),
    ),
}
_CUDA: Mapping[str, tuple[Workload, ...]] = {
    "quick": tuple(
        Workload(spec, (2, 16, 4096, 64), dtype, direction)
        for dtype in ("bfloat16", "float16", "float32")
        for spec in ("softmax", "causal", "bn", half_pooled(16))
        for direction in DIRECTIONS
        if dtype != "float16" or spec == "softmax"
    ),
    "full": tuple(
        Workload(spec, shape, dtype, direction)
        for dtype in ("bfloat16", "float16", "float32")
        for shape in ((2, 16, 4096, 64), (2, 16, 4096, 128), (8, 16, 1024, 64), (1, 16, 16384, 64))
        for spec in ("softmax", "causal", "bn", half_pooled(16))
        for direction in DIRECTIONS
    ),
}
#: The first workloads of frameworks with fused kernels, which have targets for both widths.
_FUSED_CUDA = tuple(
    Workload(spec, (2, 16, 4096, dim), "bfloat16", direction)
    for dim in (64, 128)
    for spec in ("softmax", "bn", half_pooled(16))
    for direction in DIRECTIONS
)


class Targets(NamedTuple):
    """The targets of a backend on a device, on the full grid.

    Attributes
    ----------
    ratios : mapping of (spec, shape) to number
        How many times as fast as the fastest plain NumPy peer, at least.
    against : mapping of (spec, shape, direction, peer) to number
        How many times as fast as a peer, at least.
    fastest : mapping of workload to number
        How many times as fast as the framework's fastest fused kernel for softmax, at least. These
        hold on either grid, because both have these workloads.
    specs : mapping of str to number
        How many times as fast as softmax, at least.
    linear : number or None
        How many times as fast as softmax linear attention is at the longest sequence, at least.
    memory_mib : number or None
        Peak memory of a softmax call at the longest sequence in MiB, at most.
    attention_us, bound_us : number or None
        Overhead of a call in microseconds, at most.
    import_ratio : number or None
        The time of ``import pdcore`` divided by that of ``import numpy``, at most.
    """

    ratios: Mapping[tuple[str, Shape], float] = {}
    against: Mapping[tuple[str, Shape, str, str], float] = {}
    fastest: Mapping[Workload, float] = {}
    specs: Mapping[str, float] = {}
    linear: float | None = None
    memory_mib: float | None = None
    attention_us: float | None = None
    bound_us: float | None = None
    import_ratio: float | None = None


#: How many times as fast as jax.nn on the CPU, at least; 1 for what is not listed.
_JAX_LEAST: Mapping[tuple[str, Shape, str], float] = {
    **{
        ("softmax", shape, DIRECTIONS[0]): least
        for shape, least in zip(_SHAPES, (5.0, 4.0, 3.0, 2.0), strict=True)
    },
    ("softmax", _SHAPES[0], DIRECTIONS[1]): 3.0,
}
_TARGETS: Mapping[str, Targets] = {
    "numpy:cpu": Targets(
        ratios={
            ("softmax", (1, 8, 4096, 64)): 1.5,
            ("softmax", (1, 8, 1024, 64)): 1.0,
            ("softmax", (8, 8, 512, 64)): 1.0,
            ("softmax", (32, 8, 128, 64)): 1.0,
        },
        # bn in 1.10 of softmax's time, half of the heads pooled by 2 in 0.80 of it.
        specs={"bn": 1 / 1.10, half_pooled(8): 1 / 0.80},
        linear=50.0,
        memory_mib=64.0,
        attention_us=20.0,
        bound_us=8.0,
        import_ratio=1.5,
    ),
    "torch:cpu": Targets(
        against={
            (w.spec, w.shape, w.direction, peer): 1 / most
            for w in _BY_TARGET["torch:cpu"]
            for spec, peer, most in (
                ("softmax", "torch SDPA", 1.03),
                ("bn", "torch SDPA of softmax", 1.12 if w.shape[2] >= 512 else 1.35),
                ("bn(with_std=false)", "torch SDPA of softmax", 1.03),
                (half_pooled(8), "torch SDPA of softmax", 0.82 if w.shape[2] >= 512 else None),
                ("causal+bn(statistics=prefix)", "torch SDPA of causal softmax", 1.2),
                ("causal+linear", "performer-pytorch", 1 / 5),
                ("linear", "performer-pytorch", 1.0),
            )
            if spec == w.spec and most is not None
        }
        | {
            ("bn", (1, 8, 4096, 64), direction, "literal Attention-BN, torch"): 3.0
            for direction in DIRECTIONS
        },
        attention_us=20.0,
        bound_us=8.0,
    ),
    "jax:cpu": Targets(
        against={
            (w.spec, w.shape, w.direction, "jax.nn.dot_product_attention"): _JAX_LEAST.get(
                (w.spec, w.shape, w.direction), 1.0
            )
            for w in _SOFTMAX_LIKE
            if w.spec in ("softmax", "causal")
        },
        specs={"bn": 1 / 1.10, half_pooled(8): 1 / 0.82},
        memory_mib=96.0,
    ),
    "jax:cuda": Targets(
        fastest={
            w: 1 / 1.05
            for w in (*_FUSED_CUDA, *_CUDA["full"])
            if w.spec in ("softmax", "bn") and w.dtype == "bfloat16" and w.shape[2] >= 4096
        },
    ),
    "torch:cuda": Targets(
        fastest={
            w: 1 / (1.05 if w.spec == "bn" else 0.80)
            for w in (*_FUSED_CUDA, *_CUDA["full"])
            if w.spec in ("bn", half_pooled(16)) and w.dtype == "bfloat16" and w.shape[2] >= 4096
        },
    ),
}

#: Targets for the growth of time from N to 4 N keys, on the full grid.
GROWTH: Mapping[str, Target] = {"softmax": (13.0, 18.0), "linear": (3.4, 5.0)}


def targets(backend: str, device: str) -> Targets | None:
    """Return the targets of a backend on a device, None for a backend without targets."""
    return _TARGETS.get(f"{backend}:{device.partition(':')[0]}")


def workloads(backend: str, device: str, grid: str) -> tuple[Workload, ...]:
    """Return the workloads that are timed against peers."""
    target = f"{backend}:{device.partition(':')[0]}"
    special = _BY_TARGET.get(target)
    if special is not None and grid == "full":
        return special
    if target in ("torch:cuda", "jax:cuda"):
        return tuple(dict.fromkeys((*_FUSED_CUDA, *_CUDA[grid])))
    return (_CUDA if device.startswith("cuda") else _CPU)[grid]


def long_shape(device: str, grid: str) -> Shape:
    """Return the shape of the memory figure, and of the longest softmax in the growth figure."""
    heads, dim = (16, 64) if device.startswith("cuda") else (8, 64)
    return (1, heads, 16384 if grid == "full" else 4096, dim)


def lengths(spec: str, length: int) -> list[int]:
    """Return the two lengths between which growth is measured, the second four times the first."""
    return [length, 4 * length] if spec == "linear" else [length // 4, length]
