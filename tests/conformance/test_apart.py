"""Backends and peers, each timed in its own processes, in turn."""

from __future__ import annotations

import pytest

from pdcore_conformance.bench import apart
from pdcore_conformance.bench.workload import Workload

SMALL = ["--shape", "1,2,16,4", "--rounds", "2", "--repeat", "3", "--threads", "1"]


def test_processes_take_turns() -> None:
    names = ("numpy", "textbook NumPy")
    times = apart.times_apart(
        names, Workload("softmax", (1, 2, 16, 4)), rounds=2, repeat=1, threads=1
    )
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys(names, 2)
    assert all(time > 0 for seconds in times.values() for time in seconds)


def test_the_ratio_is_that_of_adjacent_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"numpy": [1.0, 2.0], "textbook NumPy": [3.0, 6.0]}
    monkeypatch.setattr(apart, "times_apart", lambda *a, **k: times)
    assert apart.main(["numpy", "--against", "textbook NumPy", *SMALL]) == 0
    assert "numpy is 3.00 times as fast as textbook NumPy" in capsys.readouterr().out


def test_a_worker_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="nonsense"):
        apart.times_apart(
            ("nonsense",), Workload("softmax", (1, 1, 4, 4)), rounds=1, repeat=1, threads=1
        )


@pytest.mark.parametrize("arguments", [["--shape", "1,2,3"], ["--against", "nobody"]])
def test_wrong_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        apart.main(arguments)
    assert arguments[1] in capsys.readouterr().err
