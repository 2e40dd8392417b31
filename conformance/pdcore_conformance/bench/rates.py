"""The rates of a GPU, and the share of them that a backend reaches.

The rates of the GPU are measured first: bytes per second by a copy, operations per second by a
matrix product. Every rate, of the GPU and of the backend, is that of the fastest of a few calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pdcore.backend import ArrayBackend, Request
from pdcore.spec import as_spec

from ..frameworks import framework
from ..judge.calls import dtype_of
from .measurements import Bench
from .timing import interleaved
from .workload import DIRECTIONS, Shape, Workload, half_pooled, operations

__all__ = ["Sizes", "copy_rate", "product_rate", "rates", "rates_at"]

#: A figure without a target.
NO_TARGET = (None, None)


class Sizes(NamedTuple):
    """The sizes at which rates are measured.

    Attributes
    ----------
    shape : tuple of int
        The shape (B, H, N, D) of q, k and v.
    dtype : str
        The dtype of q, k and v, and of the matrices.
    copied : int
        The bytes of the array that is copied.
    side : int
        The rows and columns of the matrices.
    rounds : int
        The calls of which the fastest counts.
    """

    shape: Shape = (2, 16, 8192, 128)
    dtype: str = "bfloat16"
    copied: int = 2**30
    side: int = 8192
    rounds: int = 5


def rates(bench: Bench) -> None:
    """Measure the rates of a GPU and of the backend on it; do nothing on a CPU."""
    if bench.device.partition(":")[0] == "cuda":
        rates_at(bench, Sizes())


def rates_at(bench: Bench, sizes: Sizes) -> None:
    """Measure the rates of the device, then those of the backend's calls and statistics."""
    with bench.framework.precision(sizes.dtype):
        copy = copy_rate(bench, sizes)
        product = product_rate(bench, sizes)
        _calls(bench, sizes, product)
        _statistics(bench, sizes, copy)


def _fastest(call: Callable[[], Any], rounds: int) -> float:
    """Return the seconds of the fastest of some calls."""
    return min(interleaved({"call": call}, rounds)["call"])


def _array(bench: Bench, library: Any, shape: tuple[int, ...], dtype: str) -> Any:
    drawn = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return library.asarray(drawn.astype(dtype_of(dtype)), bench.device)


def copy_rate(bench: Bench, sizes: Sizes) -> float:
    """Measure the bytes per second that a copy by the backend's library reads and writes."""
    library = bench.framework
    x = library.asarray(np.zeros(sizes.copied // 4, np.float32), bench.device)
    seconds = _fastest(lambda: library.finish(library.xp.asarray(x, copy=True)), sizes.rounds)
    rate = 2.0 * sizes.copied / seconds
    bench.figure(
        f"copy of {sizes.copied / 2**20:g} MiB, read and written", [rate / 1e9], "GB/s", NO_TARGET
    )
    return rate


def product_rate(bench: Bench, sizes: Sizes) -> float | None:
    """Measure the operations per second of a matrix product, by PyTorch if that is installed."""
    kind, side = f"{sizes.dtype} matrix product of {sizes.side}", sizes.side
    reasons = []
    for name in dict.fromkeys(("torch", bench.framework.library)):
        library = framework(name)
        reason = library.available(bench.device)
        if reason is None:
            try:
                x = _array(bench, library, (side, side), sizes.dtype)
                seconds = _fastest(lambda: library.finish(x @ x), sizes.rounds)  # noqa: B023
            except Exception as error:  # noqa: BLE001 - a library may not multiply in this dtype
                reason = f"{type(error).__name__}: {error}"
            else:
                rate = 2.0 * side**3 / seconds
                bench.figure(f"{kind}, {name}", [rate / 1e12], "TFLOP/s", NO_TARGET)
                return rate
        reasons.append(f"{name}: {reason}")
    bench.speed["notes"].append(f"no {kind}: {'; '.join(reasons)}")
    return None


def _calls(bench: Bench, sizes: Sizes, product: float | None) -> None:
    """Measure the operations per second of calls, and their share of the matrix product's."""
    for spec in ("softmax", "causal", "bn", half_pooled(sizes.shape[1])):
        for direction in DIRECTIONS:
            workload = Workload(spec, sizes.shape, sizes.dtype, direction)
            if not bench.runs(workload) or not bench.check_backend(workload):
                continue
            call = bench.call(workload, *bench.arrays(workload, bench.framework))
            rate = operations(workload) / _fastest(call, sizes.rounds)
            bench.figure(str(workload), [rate / 1e12], "TFLOP/s", NO_TARGET)
            if product is not None:
                bench.figure(
                    f"{workload}, of the matrix product's rate",
                    [100 * rate / product],
                    "%",
                    NO_TARGET,
                )


def _statistics(bench: Bench, sizes: Sizes, copy: float) -> None:
    """Measure the bytes per second at which the statistics of Attention-BN read the keys."""
    batch, heads, length, dim = sizes.shape
    runner = bench.runner
    if not bench.runs(Workload("bn", sizes.shape, sizes.dtype)) or not isinstance(
        runner, ArrayBackend
    ):
        return
    shape = (batch, heads, length, dim)
    request = Request(
        as_spec("bn"), bench.framework.library, sizes.dtype, bench.device, shape, shape, shape
    )
    plan = runner.fuse(request.lower(), request)
    native = "statistics" in runner.native(plan)
    dtype = sizes.dtype if native else plan.accumulate
    keys = _array(bench, bench.framework, shape, dtype)
    summary = plan.summary
    assert summary is not None
    seconds = _fastest(
        lambda: bench.framework.finish(dict(runner.statistics(summary, keys, None))),
        sizes.rounds,
    )
    rate = float(np.prod(shape)) * keys.dtype.itemsize / seconds
    name = f"statistics of {dtype} keys {shape}"
    bench.figure(name, [rate / 1e9], "GB/s", NO_TARGET)
    bench.figure(f"{name}, of the copy's rate", [100 * rate / copy], "%", NO_TARGET)
