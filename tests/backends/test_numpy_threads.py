"""How many threads the NumPy backend runs, and which settings of others it honours."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import pdcore
from pdcore.errors import SettingError
from pdcore_backends.numpy import threads

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
VARIABLES = (threads.VARIABLE, threads.PIN, *threads.OTHERS)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def large_call() -> Any:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, 512, 32), dtype=np.float32)
    return pdcore.attention(q, k, v)


def in_fresh_process(code: str, **variables: str) -> str:
    kept = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


COUNT = "from pdcore_backends.numpy.threads import count; print(count())"


@pytest.mark.parametrize("name", threads.OTHERS)
def test_variables_of_others_limit_the_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_fresh_process(COUNT) == str(CORES)
    assert in_fresh_process(COUNT, **{name: "1"}) == "1"
    assert in_fresh_process(COUNT, **{name: "1,4"}) == "1"
    assert in_fresh_process(COUNT, **{name: "999"}) == str(CORES)
    assert in_fresh_process(COUNT, **{name: "many"}) == str(CORES)
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv(threads.VARIABLE, "3")
    assert threads.count() == 3  # the own variable decides


def test_a_limit_of_threadpoolctl_holds_while_it_lasts() -> None:
    code = f"""
import threading, numpy as np, pdcore
q = np.random.default_rng(0).standard_normal((1, 4, 512, 32))
from threadpoolctl import threadpool_limits
def names():
    pdcore.attention(q, q, q)
    return sum(t.name == "pdcore-numpy" for t in threading.enumerate())
for api in (None, "blas"):
    with threadpool_limits(1, user_api=api):
        assert names() == 0, names()  # not even where the backend is loaded in the block
from pdcore_backends.numpy.threads import count
assert count() == {CORES}
with threadpool_limits(1):
    assert count() == 1
print(names())
"""
    assert in_fresh_process(code) == str(CORES if CORES > 1 else 0)


def test_the_own_variable_comes_before_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.VARIABLE, "2")
    with threadpool_limits(1):
        assert threads.count() == 2


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1.5", "", "9" * 5000, "²"])
def test_a_wrong_number_is_an_error_in_small_calls_too(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(threads.VARIABLE, text)
    q = np.ones((1, 1, 2, 2))
    for spec in ("softmax", "linear"):
        with pytest.raises(
            SettingError, match=r"PDCORE_NUM_THREADS: got .*, expected a whole numb"
        ):
            pdcore.attention(q, q, q, spec)


def affinities() -> list[set[int]]:
    barrier, seen = threading.Barrier(CORES), []

    def look(task: int) -> None:
        barrier.wait(10)  # so that each worker has one task
        seen.append(os.sched_getaffinity(0))

    threads.run(look, range(CORES), CORES)
    return seen


@pytest.mark.skipif(CORES < 2 or not hasattr(os, "sched_setaffinity"), reason="one core, or no API")
def test_workers_are_bound_to_cores_only_by_option(monkeypatch: pytest.MonkeyPatch) -> None:
    every = os.sched_getaffinity(0)
    assert affinities() == [every] * CORES
    monkeypatch.setenv(threads.PIN, "1")
    assert sorted(min(cores) for cores in affinities()) == sorted(every)
    monkeypatch.setenv(threads.PIN, "yes")
    with pytest.raises(SettingError, match="PDCORE_PIN_THREADS: got 'yes', expected 0 or 1"):
        affinities()


def test_results_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = large_call()
    monkeypatch.setenv(threads.VARIABLE, "3")
    np.testing.assert_array_equal(large_call(), whole)
