"""The variables of a process that runs a backend."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pdcore_backends.cupy import cubins

from .prepared import FOLDER

__all__ = ["core_count", "process_environment"]


def core_count() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def process_environment(device: str, *, threads: int | None = None) -> dict[str, str]:
    """Return the environment variables of a process.

    Parameters
    ----------
    device : str
        The device that the process uses.
    threads : int, optional
        The threads of the BLAS and of OpenMP, for one of many processes that measure no times.
        XLA then takes its first algorithm for a GPU instead of timing several, which would take
        longer than a case of the suite; the record states the flags. By default nothing is set.
    """
    variables = dict(os.environ)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            variables[name] = str(threads)
        # PyTorch's compiler would start one process for every core.
        variables.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if device.partition(":")[0] != "cuda":
        return variables
    # Kernels that were compiled at home; one that is not there is compiled.
    if (compiled := FOLDER / "cubins").is_dir():
        variables.setdefault(cubins.FOLDER, str(compiled))
    # Processes share the GPU: none may allocate all of its memory at the start.
    variables.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The programs that JAX has compiled are there for a resumed run.
    cache = Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdcore" / "jax"
    variables.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    variables.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = variables.get("XLA_FLAGS", "")
    if threads is not None and "xla_gpu_autotune_level" not in flags:
        variables["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    return variables
