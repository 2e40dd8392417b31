"""What a GPU does in a second, and which share of that a backend reaches.

The machine's own rates come first: bytes by a copy, operations by a matrix product. Rates of a
backend are those of its fastest call of a few, as the machine's are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pdcore.backend import ArrayBackend, Request
from pdcore.spec import as_spec

from ..frameworks import framework
from ..judge.calls import dtype_of
from .grid import BOTH, Shape
from .peers import Workload, half_pooled
from .timing import interleaved

if TYPE_CHECKING:
    from .speed import Bench

__all__ = ["Sizes", "operations", "rates", "rates_at"]

NONE = (None, None)


class Sizes(NamedTuple):
    """What is measured.

    Attributes
    ----------
    shape : tuple of int
        Of the calls, (B, H, N, D).
    dtype : str
        Theirs, and of the matrix product.
    copied : int
        Bytes of the array that is copied.
    side : int
        Of the square matrices.
    rounds : int
    """

    shape: Shape = (2, 16, 8192, 128)
    dtype: str = "bfloat16"
    copied: int = 2**30
    side: int = 8192
    rounds: int = 5


def rates(bench: Bench) -> None:
    """Measure a GPU and the backend on it; nothing on a CPU."""
    if bench.device.partition(":")[0] == "cuda":
        rates_at(bench, Sizes())


def rates_at(bench: Bench, sizes: Sizes) -> None:
    """Measure the machine, then the backend's calls and statistics against it."""
    with bench.framework.precision(sizes.dtype):
        copy = _copy(bench, sizes)
        product = _product(bench, sizes)
        _calls(bench, sizes, product)
        _statistics(bench, sizes, copy)


def operations(workload: Workload) -> float:
    """Count the operations of a call's matrix products, as is usual: those that causal hides not.

    Two products forward, five backward; a head of scale s has the keys of every s-th.
    """
    batch, heads, length, dim = workload.shape
    scales = as_spec(workload.spec).heads.scales or (1,) * heads
    seen = 0.5 if "causal" in workload.spec else 1.0
    pairs = seen * sum(length * -(-length // scale) for scale in scales)
    products = 2 if workload.direction == "forward" else 7
    return 2.0 * products * batch * pairs * dim


def _fastest(call: Callable[[], Any], rounds: int) -> float:
    return min(interleaved({"call": call}, rounds)["call"])


def _array(bench: Bench, library: Any, shape: tuple[int, ...], dtype: str) -> Any:
    drawn = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return library.asarray(drawn.astype(dtype_of(dtype)), bench.device)


def _copy(bench: Bench, sizes: Sizes) -> float:
    """Measure bytes read and written in a second by a copy of the backend's library."""
    library = bench.framework
    x = library.asarray(np.zeros(sizes.copied // 4, np.float32), bench.device)
    seconds = _fastest(lambda: library.finish(library.xp.asarray(x, copy=True)), sizes.rounds)
    found = 2.0 * sizes.copied / seconds
    bench.figure(
        f"copy of {sizes.copied / 2**20:g} MiB, read and written", [found / 1e9], "GB/s", NONE
    )
    return found


def _product(bench: Bench, sizes: Sizes) -> float | None:
    """Measure operations in a second by a matrix product, PyTorch's where it is there."""
    kind, side = f"{sizes.dtype} matrix product of {sizes.side}", sizes.side
    said = []
    for name in dict.fromkeys(("torch", bench.framework.library)):
        library = framework(name)
        why = library.available(bench.device)
        if why is None:
            try:
                x = _array(bench, library, (side, side), sizes.dtype)
                seconds = _fastest(lambda: library.finish(x @ x), sizes.rounds)  # noqa: B023
            except Exception as error:  # noqa: BLE001 - a library may not multiply in this dtype
                why = f"{type(error).__name__}: {error}"
            else:
                found = 2.0 * side**3 / seconds
                bench.figure(f"{kind}, {name}", [found / 1e12], "TFLOP/s", NONE)
                return found
        said.append(f"{name}: {why}")
    bench.speed["notes"].append(f"no {kind}: {'; '.join(said)}")
    return None


def _calls(bench: Bench, sizes: Sizes, product: float | None) -> None:
    """Measure calls, forward and backward, as a share of the matrix product's rate."""
    for spec in ("softmax", "causal", "bn", half_pooled(sizes.shape[1])):
        for direction in BOTH:
            workload = Workload(spec, sizes.shape, sizes.dtype, direction)
            if not bench.runs(workload) or not bench.own(workload):
                continue
            call = bench.call(workload, *bench.arrays(workload, bench.framework))
            found = operations(workload) / _fastest(call, sizes.rounds)
            bench.figure(str(workload), [found / 1e12], "TFLOP/s", NONE)
            if product is not None:
                bench.figure(
                    f"{workload}, of the matrix product's rate", [100 * found / product], "%", NONE
                )


def _statistics(bench: Bench, sizes: Sizes, copy: float) -> None:
    """Measure bytes of keys in a second by the statistics of Attention-BN, read once."""
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
    found = float(np.prod(shape)) * keys.dtype.itemsize / seconds
    name = f"statistics of {dtype} keys {shape}"
    bench.figure(name, [found / 1e9], "GB/s", NONE)
    bench.figure(f"{name}, of the copy's rate", [100 * found / copy], "%", NONE)
