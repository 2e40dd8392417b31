"""Measure the peak memory of one call, in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pdcore import bind

from .workload import Shape

__all__ = ["WAYS", "draw_qkv", "peak_here", "peak_memory", "run_python", "status"]

Array = np.ndarray[Any, Any]

#: How memory is measured. ``tracemalloc`` counts NumPy's arrays, but not the memory of the BLAS.
#: ``resident`` is the resident set size; it misses pages that were touched before and are reused.
WAYS = ("tracemalloc", "resident")
MIB = 2.0**20


def draw_qkv(shape: Shape) -> tuple[Array, Array, Array]:
    """Draw float32 q, k and v of one shape."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    return q, k, v


def peak_memory(backend: str, shape: Shape, way: str, threads: int) -> float | None:
    """Measure the peak memory of a softmax call.

    Parameters
    ----------
    backend : str
        The name of the backend.
    shape : tuple of int
        The shape of q, k and v.
    way : {"tracemalloc", "resident"}
        See `WAYS`.
    threads : int
        The threads of the BLAS and of the NumPy backend.

    Returns
    -------
    float or None
        MiB beyond inputs and result; None where the system does not report it.
    """
    code = f"from {__name__} import peak_here; peak_here({backend!r}, {shape!r}, {way!r})"
    names = ("PDCORE_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    peak = json.loads(run_python(code, **dict.fromkeys(names, str(threads))))
    return None if peak is None else float(peak)


def peak_here(backend: str, shape: Shape, way: str) -> None:
    """Measure in this process, and print the figure as JSON.

    A tiny call comes first, which imports the code and starts the threads. Scratch arrays that a
    backend keeps for later calls are counted, as the tiny call needs only small ones.
    """
    layer = bind("softmax", backend=backend)
    layer(*draw_qkv((1, 1, 8, 8)))
    arrays = draw_qkv(shape)
    before: float | None
    if way == "tracemalloc":
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0] / MIB
    else:
        before = status("VmRSS")
    out = layer(*arrays)
    if way == "tracemalloc":
        peak = tracemalloc.get_traced_memory()[1] / MIB
    else:
        peak = status("VmHWM")
    known = before is not None and peak is not None
    print(json.dumps(peak - before - out.nbytes / MIB if known else None))


def status(field: str) -> Any:
    """Return a field of ``/proc/self/status``, such as ``"VmHWM"``, in MiB; None if absent."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return float(line.split()[1]) / 1024
    return None


def run_python(code: str, **variables: str) -> str:
    """Run code in a new interpreter and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **variables},
    )
    return done.stdout
