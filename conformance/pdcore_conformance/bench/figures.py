"""Figures of a backend without a peer.

These are its specs beside each other, growth, memory, overhead of a call, and time of import.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from pdcore import attention, bind
from pdcore.backend import Inputs

from .grid import GROWTH, lengths, long_shape, workloads
from .measurements import Bench
from .memory import WAYS, peak_memory, run_python
from .rates import rates
from .timing import interleaved, interval, judged, quartiles
from .workload import Workload, half_pooled

__all__ = ["FIGURES"]

MIB = 2.0**20


def against_softmax(bench: Bench) -> None:
    """Time Attention-BN and Attention-SH against softmax."""
    first = workloads(bench.backend, bench.device, bench.grid)[0]
    half = half_pooled(first.shape[1])
    by_spec = {spec: Workload(spec, first.shape, first.dtype) for spec in ("softmax", "bn", half)}
    with bench.framework.precision(first.dtype):
        if not all(bench.check_backend(workload) for workload in by_spec.values()):
            return
        times = bench.timed(
            {
                spec: bench.call(workload, *bench.arrays(workload, bench.framework))
                for spec, workload in by_spec.items()
            }
        )
    least = bench.targets.specs if bench.targets and bench.grid == "full" else {}
    for spec in ("bn", half):
        bench.ratio(
            by_spec[spec],
            "spec softmax",
            times["softmax"],
            times[spec],
            (least.get(spec), None),
        )


def growth(bench: Bench) -> None:
    """Measure how time grows from N to 4 N keys, and linear attention against softmax."""
    shape = long_shape(bench.device, bench.grid)
    length = shape[2]
    calls: dict[str, Callable[[], Any]] = {}
    with bench.framework.precision("float32"):
        for spec in GROWTH:
            for n in lengths(spec, length):
                workload = Workload(spec, (shape[0], shape[1], n, shape[3]))
                if n == length and not bench.check_backend(workload):
                    return
                calls[f"{spec} {n}"] = bench.call(
                    workload, *bench.arrays(workload, bench.framework)
                )
        times = interleaved(calls, 3 if bench.grid == "quick" else 5)
    complete = bench.grid == "full"
    for spec, target in GROWTH.items():
        first, last = lengths(spec, length)
        before, after = times[f"{spec} {first}"], times[f"{spec} {last}"]
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        bench.speed["growth"].append(
            {
                "spec": spec,
                "dtype": "float32",
                "direction": "forward",
                "lengths": [first, last],
                "seconds": [quartiles(before), quartiles(after)],
                "factor": statistics.median(ratios),
                "interval": interval(ratios),
                "from": first,
                "to": last,
                **judged(statistics.median(ratios), target if complete else (None, None)),
            }
        )
    least = bench.targets.linear if bench.targets and complete else None
    bench.ratio(
        Workload("linear", shape),
        "spec softmax",
        times[f"softmax {length}"],
        times[f"linear {length}"],
        (least, None),
    )


def memory(bench: Bench) -> None:
    """Measure the peak memory beyond inputs and results."""
    shape = long_shape(bench.device, bench.grid)
    most = bench.targets.memory_mib if bench.targets and bench.grid == "full" else None
    if bench.device == "cpu":
        # Only NumPy reports its arrays to tracemalloc.
        ways = WAYS if bench.framework.library == "numpy" else ("resident",)
        for way in ways:
            peak = peak_memory(bench.backend, shape, way, bench.threads)
            if peak is not None:
                _memory(bench, Workload("softmax", shape), way, peak, most)
        return
    meter = bench.framework.memory(bench.device)
    if meter is None:
        bench.speed["notes"].append(f"{bench.framework.library} tells no peak memory")
        return
    for direction in ("forward", "forward+backward"):
        workload = Workload("softmax", shape, "bfloat16", direction)
        if not bench.runs(workload):
            continue
        x, d = bench.arrays(workload, bench.framework)
        call = bench.call(workload, x, d)
        call()
        bench.framework.release()
        meter.reset()
        result = call()
        used = meter.read()
        if used is not None:
            results = sum(bench.framework.asnumpy(y).nbytes for y in _leaves(result))
            _memory(bench, workload, "device", (used - results) / MIB, None)


def _memory(bench: Bench, workload: Workload, way: Any, mib: float, most: float | None) -> None:
    met = judged(mib, (None, most))
    bench.speed["memory"].append(
        {
            "spec": workload.spec,
            "shape": list(workload.shape),
            "dtype": workload.dtype,
            "direction": workload.direction,
            "way": way,
            "mib": mib,
            "at_most": most,
            "met": met["met"],
        }
    )


def overhead(bench: Bench) -> None:
    """Measure the time of a warm call beyond that of the backend's function."""
    tiny = Workload("softmax", (1, 1, 8, 8))
    x, _ = bench.arrays(tiny, bench.framework)
    bound = bind("softmax", backend=bench.backend)
    runner, plan, inputs, _ = bound.prepare(Inputs(x["q"], x["k"], x["v"]))
    with bench.framework.precision("float32"):
        times = interleaved(
            {
                "direct": lambda: runner.attention(plan, inputs),
                "bound": lambda: bound(x["q"], x["k"], x["v"]),
                "attention": lambda: attention(x["q"], x["k"], x["v"], backend=bench.backend),
            },
            60 if bench.grid == "quick" else 300,
            warm_up=3,
            repeat=20,
        )
    for name, title in (("attention", "attention()"), ("bound", "a bound callable")):
        extra = [1e6 * (a - b) for a, b in zip(times[name], times["direct"], strict=True)]
        most = getattr(bench.targets, f"{name}_us", None)
        bench.figure(f"{title} at (1, 1, 8, 8): warm overhead", extra, "us", (None, most))


def importing(bench: Bench) -> None:
    """Measure the time of ``import pdcore`` divided by that of ``import numpy``."""
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    times: dict[str, list[float]] = {"pdcore": [], "numpy": []}
    with tempfile.TemporaryDirectory() as folder:
        # An installer compiles to bytecode; do so even where the environment disables it.
        compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder}
        for turn in range(-1, 5 if bench.grid == "quick" else 15):
            for name, seconds in times.items():
                elapsed = float(run_python(code.format(name), **compiled))
                if turn >= 0:
                    seconds.append(elapsed)
    ratios = [a / b for a, b in zip(times["pdcore"], times["numpy"], strict=True)]
    most = None if bench.targets is None else bench.targets.import_ratio
    bench.figure("import pdcore: time over import numpy", ratios, "x", (None, most))


def _leaves(result: Any) -> list[Any]:
    """Return the arrays in nested mappings, tuples and lists."""
    if isinstance(result, Mapping):
        return [leaf for part in result.values() for leaf in _leaves(part)]
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in _leaves(part)]
    return [result]


#: The functions that measure a figure, by title.
FIGURES: Mapping[str, Callable[[Bench], None]] = {
    "bn and sh against softmax": against_softmax,
    "rates of the device": rates,
    "growth with the length": growth,
    "memory": memory,
    "overhead of a call": overhead,
    "import": importing,
}
