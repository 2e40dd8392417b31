"""Speed and memory of a backend, each figure beside its target.

Everything is float32. Nothing is timed before the numerics are green: each spec is run at the
shape that will be timed, and a sample of its rows is held against the oracle.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pdcore import Backend, attention, bind
from pdcore.backend import Inputs
from pdcore.plugins import load_backend

from .budget import Verdict, expect, judge
from .memory import WAYS, draw, peak_memory, run_python
from .plain import VARIANTS
from .timing import environment, interleaved, interval, quartiles, threads_limited

__all__ = ["LONG", "SHAPES", "figure", "measure"]

Array = np.ndarray[Any, Any]
Shape = tuple[int, int, int, int]
Target = tuple[float | None, float | None]  # at least, at most

#: (B, H, N, D) of softmax against plain NumPy, each with the least ratio.
SHAPES: Mapping[Shape, float] = {
    (1, 8, 4096, 64): 1.5,
    (1, 8, 1024, 64): 1.0,
    (8, 8, 512, 64): 1.0,
    (32, 8, 128, 64): 1.0,
}
LONG: Shape = (1, 8, 16384, 64)
HALF = "sh(1,1,1,1,2,2,2,2)"
SAMPLE = 32


def measure(
    backend: str = "numpy",
    *,
    quick: bool = False,
    threads: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure everything.

    Parameters
    ----------
    backend : str
        Its name.
    quick : bool
        Fewer rounds, and a quarter of the longest sequences; figures whose target is stated for
        the full length are then reported without a verdict.
    threads : int
        Of the BLAS and of the NumPy backend.
    say : callable
        Is told what is going on.

    Returns
    -------
    dict
        ``schema``, ``created``, ``backend``, ``quick``, ``threads``, ``environment``, ``notes``,
        ``numerics``, ``red`` and ``figures``, see `figure`. Where the numerics are red there are
        no figures.
    """
    load_backend(backend)
    with threads_limited(threads) as limited:
        record: dict[str, Any] = {
            "schema": 1,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "backend": backend,
            "versions": load_backend(backend).versions(),
            "dtype": "float32",
            "quick": quick,
            "threads": threads,
            "environment": environment(),
            "notes": _notes(limited),
            "numerics": [],
            "red": False,
            "figures": [],
        }
        say("numerics")
        record["numerics"] = list(_numerics(backend, quick))
        record["red"] = any(not row["ok"] for row in record["numerics"])
        if record["red"]:
            return record
        for title, group in _GROUPS.items():
            say(title)
            record["figures"] += group(backend, quick, threads)
    return record


def figure(
    name: str, value: float, unit: str, target: Target, *, judged: bool = True, **more: Any
) -> dict[str, Any]:
    """Set a figure beside its target.

    Returns
    -------
    dict
        ``name``, ``value``, ``unit``, ``at_least``, ``at_most``, ``met`` (None where it is not
        judged) and whatever else belongs to it.
    """
    low, high = target
    met = (low is None or value >= low) and (high is None or value <= high)
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "at_least": low,
        "at_most": high,
        "met": met if judged else None,
        **more,
    }


def check(
    run: Callable[..., Any], spec: str, arrays: Sequence[Array], outputs: Sequence[str]
) -> dict[str, Verdict]:
    """Hold a sample of the rows of a full-size call against the oracle."""
    q, k, v = arrays
    result = run(q, k, v)
    rows = np.unique(np.linspace(0, q.shape[-2] - 1, SAMPLE).astype(int))
    got = dict(zip(outputs, result if len(outputs) > 1 else (result,), strict=True))
    got = {n: x[..., rows, :] if n == "out" else x[..., rows] for n, x in got.items()}
    return judge(got, expect(q[..., rows, :], k, v, spec))


def _numerics(backend: str, quick: bool) -> Any:
    cases: list[tuple[str, Shape]] = [("softmax", shape) for shape in SHAPES]
    first, long = next(iter(SHAPES)), _long(quick)
    cases += [("bn", first), (HALF, first), ("softmax", long), ("linear", long)]
    for spec, shape in cases:
        bound, arrays = bind(spec, backend=backend), draw(shape)

        def run(*qkv: Array, bound: Any = bound) -> Any:
            return bound(*qkv, return_lse=True)

        yield _verdict(spec, shape, backend, check(run, spec, arrays, ("out", "lse")))
    for name, plain in VARIANTS.items():
        shape = (1, 8, 1024, 64)
        verdicts = check(plain, "softmax", draw(shape), ("out",))
        yield _verdict("softmax", shape, f"plain NumPy, {name}", verdicts)


def _verdict(spec: str, shape: Shape, by: str, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    return {
        "spec": spec,
        "shape": list(shape),
        "by": by,
        "error_over_budget": {name: verdict.ratio for name, verdict in verdicts.items()},
        "ok": all(verdict.ok for verdict in verdicts.values()),
    }


def _long(quick: bool) -> Shape:
    return (*LONG[:2], LONG[2] // 4, LONG[3]) if quick else LONG


def _ratio(
    name: str, times: Mapping[str, list[float]], above: str, below: str, target: Target,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Make a figure of the median of the ratios of times measured next to one another."""
    ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
    return figure(
        name,
        statistics.median(ratios),
        "x",
        target,
        interval=interval(ratios),
        seconds={n: quartiles(times[n]) for n in (above, below)},
        **more,
    )


def against_plain(backend: str, quick: bool, threads: int) -> list[dict[str, Any]]:
    """Softmax against the fastest variant of plain NumPy."""
    figures = []
    layer = bind("softmax", backend=backend)
    for shape, least in SHAPES.items():
        q, k, v = draw(shape)
        calls: dict[str, Callable[[], Any]] = {
            name: partial(plain, q, k, v) for name, plain in VARIANTS.items()
        }
        once = {name: min(t) for name, t in interleaved(calls, 2).items()}
        best = min(once.values())
        # Where calls are long, a variant that is far behind costs time and decides nothing.
        if best > 0.3:
            calls = {name: call for name, call in calls.items() if once[name] < 1.5 * best}
        calls[backend] = partial(layer, q, k, v)
        rounds = _rounds(best, quick)
        times = interleaved(calls, rounds)
        fastest = min(
            (name for name in calls if name != backend), key=lambda n: statistics.median(times[n])
        )
        others = {n: once[n] if n not in times else statistics.median(times[n]) for n in once}
        figures.append(
            _ratio(
                f"softmax at {shape}: times as fast as plain NumPy",
                times,
                fastest,
                backend,
                (least, None),
                baseline=fastest,
                variants=others,
            )
        )
    return figures


def against_softmax(backend: str, quick: bool, threads: int) -> list[dict[str, Any]]:
    """Attention-BN and Attention-SH against softmax."""
    shape = next(iter(SHAPES))
    q, k, v = draw(shape)
    layers = {spec: bind(spec, backend=backend) for spec in ("softmax", "bn", HALF)}
    times = interleaved(
        {spec: partial(layer, q, k, v) for spec, layer in layers.items()},
        4 if quick else 11,
    )
    return [
        _ratio(f"bn at {shape}: time over softmax", times, "bn", "softmax", (None, 1.10)),
        _ratio(
            f"sh, half of the heads at 2, at {shape}: time over softmax", times, HALF, "softmax",
            (None, 0.80),
        ),
    ]  # fmt: skip


def growth(backend: str, quick: bool, threads: int) -> list[dict[str, Any]]:
    """Time from N to 4 N, and linear attention against softmax."""
    length = _long(quick)[2]
    calls: dict[str, Callable[[], Any]] = {}
    for spec, lengths in (("softmax", (length // 4, length)), ("linear", (length, 4 * length))):
        for n in lengths:
            q, k, v = draw((1, 8, n, 64))
            layer = bind(spec, backend=backend)
            calls[f"{spec} {n}"] = partial(layer, q, k, v)
    times = interleaved(calls, 3 if quick else 5)
    n, quarter, four = length, length // 4, 4 * length
    judged = {"judged": not quick}
    return [
        _ratio(
            f"linear at N = {n}: times as fast as softmax", times, f"softmax {n}", f"linear {n}",
            (50.0, None), **judged,
        ),
        _ratio(
            f"softmax from N = {quarter} to {n}: growth of time", times, f"softmax {n}",
            f"softmax {quarter}", (13.0, 18.0), **judged,
        ),
        _ratio(
            f"linear from N = {n} to {four}: growth of time", times, f"linear {four}",
            f"linear {n}", (3.4, 5.0), **judged,
        ),
    ]  # fmt: skip


def memory(backend: str, quick: bool, threads: int) -> list[dict[str, Any]]:
    """Peak memory beside inputs and result, in a process of its own."""
    shape = _long(quick)
    found = {way: peak_memory(backend, shape, way, threads) for way in WAYS}
    worst = max(value for value in found.values() if value is not None)
    return [
        figure(
            f"softmax at {shape}: peak memory beside inputs and result", worst, "MiB", (None, 64.0),
            judged=not quick, measured=found,
        )
    ]  # fmt: skip


def overhead(backend: str, quick: bool, threads: int) -> list[dict[str, Any]]:
    """What a warm call costs beyond the backend's own work."""
    q, k, v = draw((1, 1, 8, 8))
    bound = bind("softmax", backend=backend)
    runner: Backend
    runner, plan, inputs, _ = bound.prepare(Inputs(q, k, v))
    chosen = None if backend == "numpy" else backend
    times = interleaved(
        {
            "direct": lambda: runner.attention(plan, inputs),
            "bound": lambda: bound(q, k, v),
            "attention": lambda: attention(q, k, v, backend=chosen),
        },
        60 if quick else 300,
        warm_up=3,
        repeat=20,
    )
    figures = []
    for name, most in (("attention", 20.0), ("bound", 8.0)):
        extra = [1e6 * (a - b) for a, b in zip(times[name], times["direct"], strict=True)]
        title = "attention()" if name == "attention" else "a bound callable"
        figures.append(
            figure(
                f"{title} at (1, 1, 8, 8): warm overhead",
                statistics.median(extra),
                "us",
                (None, most),
                interval=interval(extra),
                seconds={n: quartiles(times[n]) for n in (name, "direct")},
            )
        )
    return figures


def importing(backend: str, quick: bool, threads: int) -> list[dict[str, Any]]:
    """The time of ``import pdcore`` over that of ``import numpy``, in fresh processes."""
    timed = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    times: dict[str, list[float]] = {"pdcore": [], "numpy": []}
    with tempfile.TemporaryDirectory() as folder:
        # Bytecode, as an installer leaves it, also where the environment forbids to write it.
        compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder}
        for turn in range(-1, 5 if quick else 15):
            for name, taken in times.items():
                seconds = float(run_python(timed.format(name), **compiled))
                if turn >= 0:
                    taken.append(seconds)
    return [_ratio("import pdcore: time over import numpy", times, "pdcore", "numpy", (None, 1.5))]


_GROUPS: Mapping[str, Callable[[str, bool, int], list[dict[str, Any]]]] = {
    "softmax against plain NumPy": against_plain,
    "bn and sh against softmax": against_softmax,
    "long sequences": growth,
    "memory": memory,
    "overhead of a call": overhead,
    "import": importing,
}


def _rounds(seconds: float, quick: bool) -> int:
    """Spend a few seconds on each call, in 5 rounds at the least."""
    return 3 if quick else int(min(31, max(7, 4.0 / seconds)))


def _notes(limited: bool) -> list[str]:
    notes = []
    if not limited:
        notes.append("threadpoolctl is not installed: the threads of the BLAS are not limited")
    load = environment()["load"]
    if load is not None and load > 0.5:
        notes.append(f"the machine is busy (load {load:.2f}): figures may be off")
    try:
        import scipy.stats  # noqa: F401
    except ModuleNotFoundError:
        notes.append("SciPy is not installed: no bootstrap intervals")
    return notes
