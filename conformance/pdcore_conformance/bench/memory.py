"""The peak memory of one call, measured in a process of its own."""

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

__all__ = ["WAYS", "draw", "peak_here", "peak_memory", "run_python", "status"]

Array = np.ndarray[Any, Any]
Shape = tuple[int, int, int, int]

#: ``tracemalloc`` knows the arrays of NumPy, which reports them to it, and nothing of the BLAS;
#: ``resident`` is what the system sees, but only where a page is touched for the first time.
WAYS = ("tracemalloc", "resident")
MIB = 2.0**20


def draw(shape: Shape) -> tuple[Array, Array, Array]:
    """Draw float32 q, k and v of one shape."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    return q, k, v


def peak_memory(backend: str, shape: Shape, way: str, threads: int) -> float | None:
    """Measure a softmax call.

    Parameters
    ----------
    backend : str
        Its name.
    shape : tuple of int
        Of q, k and v.
    way : {"tracemalloc", "resident"}
        See `WAYS`.
    threads : int
        Of the BLAS and of the NumPy backend.

    Returns
    -------
    float or None
        MiB beside inputs and result; None where the system does not tell.
    """
    code = f"from {__name__} import peak_here; peak_here({backend!r}, {shape!r}, {way!r})"
    names = ("PDCORE_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    found = json.loads(run_python(code, **dict.fromkeys(names, str(threads))))
    return None if found is None else float(found)


def peak_here(backend: str, shape: Shape, way: str) -> None:
    """Measure in this process, and print the figure as JSON.

    Scratch arrays that a backend keeps for its next call count too, for nothing but a tiny call,
    which imports the code and starts the threads, comes before.
    """
    layer = bind("softmax", backend=backend)
    layer(*draw((1, 1, 8, 8)))
    arrays = draw(shape)
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
    """Read a field of this process, such as ``"VmHWM"``, in MiB; None where there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return float(line.split()[1]) / 1024
    return None


def run_python(code: str, **variables: str) -> str:
    """Run code in a fresh interpreter and give what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **variables},
    )
    return done.stdout
