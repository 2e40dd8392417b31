"""The stages of a run on a GPU, in the order of their worth, and the steps of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..bench.workload import DIRECTIONS, Workload, half_pooled
from .calls import KERNELS, PATHS
from .prepared import cases
from .ptx_wrappers import checks
from .tools import SANITIZERS
from .variants import variant_steps

__all__ = ["STAGES", "Stage", "deadlines", "workloads"]

#: The backends with CUDA kernels of our own, and all.
_KERNELS = ("cupy",)
_ALL = ("torch", "jax", "cupy")


class Stage(NamedTuple):
    """A part of a run.

    Attributes
    ----------
    name, about : str
    until : float
        Its end, in minutes of a run of twelve.
    limit : float
        The most seconds for a step.
    backends : tuple of str
        The backends that have it, in this order.
    steps : callable
        From a target and the device to the names of its steps, in order.
    processes : float
        The most processes for a backend: infinite for one for each step.
    together : bool
        Whether the backends run at the same time.
    first : bool
        Whether only the first of the backends that is there runs it.
    """

    name: str
    about: str
    until: float
    limit: float
    backends: tuple[str, ...]
    steps: Callable[[str], Sequence[str]]
    processes: float = 1
    together: bool = True
    first: bool = False


def workloads(device: str) -> tuple[Workload, ...]:
    """Return the calls that are timed, in order."""
    specs = ("softmax", "bn", "causal", half_pooled(16), f"bn+{half_pooled(16)}")
    prefix = "causal+bn(statistics=prefix)"
    dtype, lengths = "float32", [[(1, 16, 128, 64)]]
    if device.partition(":")[0] == "cuda":
        dtype = "bfloat16"
        lengths = [[(*lead, dim) for dim in (64, 128)] for lead in ((2, 16, 4096), (1, 16, 16384))]
    return tuple(
        Workload(spec, shape, dtype, direction)
        for shapes in lengths
        for spec in (*specs, prefix)
        for shape in shapes
        for direction in DIRECTIONS
    )


def _device(target: str) -> str:
    return target.partition(":")[2]


def _named(*names: str) -> Callable[[str], Sequence[str]]:
    return lambda target: names


def _paths(target: str) -> Sequence[str]:
    paths = PATHS.get(target.partition(":")[0])
    return list(PATHS["torch"] if paths is None else paths)


def _variants(target: str) -> Sequence[str]:
    backend, _, device = target.partition(":")
    return list(variant_steps(backend, device))


#: Every stage, in order.
STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("machine", "versions and imports", 0.2, 90, _ALL, _named("versions")),
        Stage("rates", "ceilings of the GPU", 0.35, 60, _ALL, _named("rates"), first=True),
        Stage(
            "wrappers",
            "PTX wrappers, bit by bit",
            0.6,
            60,
            _KERNELS,
            lambda target: [check.name for check in checks()],
        ),
        Stage(
            "kernels",
            "each CUDA kernel once",
            1.0,
            60,
            _KERNELS,
            lambda target: list(KERNELS),
            math.inf,
        ),
        Stage("paths", "each code path once", 2.0, 60, _ALL, _paths, 4),
        Stage(
            "speed",
            "times by CUDA events",
            5.5,
            60,
            _ALL,
            lambda target: [str(w) for w in workloads(_device(target))],
            together=False,
        ),
        Stage(
            "variants", "variants that decide a design", 6.5, 60, _ALL, _variants, together=False
        ),
        Stage("profile", "Nsight Compute", 8.0, 600, _KERNELS, _named("ncu")),
        Stage("sanitizer", "sanitizers", 9.5, 600, _KERNELS, _named(*SANITIZERS)),
        Stage(
            "suite",
            "the core level of the suite",
            12.0,
            60,
            ("cupy", "torch", "jax"),
            lambda target: cases(target) or [],
            5,
        ),
    )
}


def deadlines(names: Sequence[str], minutes: float) -> dict[str, float]:
    """Return the second at which each of some stages ends, of so many minutes in all.

    A stage that is done before gives its time to those after it.
    """
    shares, before = {}, 0.0
    for name, stage in STAGES.items():
        if name in names:
            shares[name] = stage.until - before
        before = stage.until
    whole, end, ends = sum(shares.values()), 0.0, {}
    for name, share in shares.items():
        end += share
        ends[name] = 60.0 * minutes * end / whole
    return ends
