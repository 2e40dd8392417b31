"""The NumPy backend in the processes of joblib, by which scikit-learn works with `n_jobs`."""

from __future__ import annotations

import os

import joblib
import pytest

from pdcore_backends.numpy import threads

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def test_processes_of_joblib_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (threads.VARIABLE, threads.PIN, *threads.OTHERS):
        monkeypatch.delenv(name, raising=False)
    with joblib.parallel_config(backend="loky", n_jobs=CORES):
        counts = joblib.Parallel()(joblib.delayed(threads.count)() for _ in range(CORES))
    assert counts == [1] * CORES
