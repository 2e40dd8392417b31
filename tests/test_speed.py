"""The speed bench: what it refuses, how it judges, and that its measurements measure."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pdcore.cli import Exit
from pdcore.commands import app
from pdcore_backends.numpy.impl import NumpyBackend
from pdcore_conformance import speed
from pdcore_conformance.memory import WAYS, draw, peak_memory
from pdcore_conformance.plain import VARIANTS
from pdcore_conformance.timing import (
    environment,
    interleaved,
    interval,
    quartiles,
    threads_limited,
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that take no time, and no fresh processes."""
    monkeypatch.setattr(speed, "SHAPES", {(1, 8, 64, 16): 1.5, (2, 8, 32, 16): 1.0})
    monkeypatch.setattr(speed, "LONG", (1, 8, 128, 16))
    groups = {n: g for n, g in speed._GROUPS.items() if n not in ("memory", "import")}
    monkeypatch.setattr(speed, "_GROUPS", groups)


def test_calls_are_interleaved_and_counted() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(calls, 3, warm_up=1, repeat=2)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert len(order) == 2 * 2 * (3 + 1)
    assert order[:8] in (list("aabbbbaa"), list("bbaaaabb"))


def test_times_are_seconds_a_call() -> None:
    times = interleaved({"sleep": lambda: time.sleep(0.01)}, 3, repeat=3)
    assert all(0.009 < t < 5 for t in times["sleep"])


def test_summaries() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([1.0]) == [1.0, 1.0, 1.0]
    span = interval([1.0, 1.1, 0.9, 1.05, 0.95, 1.02])
    assert span is not None
    assert 0.9 <= span[0] < 1.01 < span[1] <= 1.1
    assert interval([1.0, 2.0]) is None


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [
        (1.6, (1.5, None), True),
        (1.4, (1.5, None), False),
        (1.05, (None, 1.1), True),
        (1.2, (None, 1.1), False),
        (15.0, (13.0, 18.0), True),
        (12.9, (13.0, 18.0), False),
        (float("nan"), (1.5, None), False),
    ],
)
def test_figures_are_met_or_not(value: float, target: speed.Target, met: bool) -> None:
    assert speed.figure("name", value, "x", target)["met"] is met
    assert speed.figure("name", value, "x", target, judged=False)["met"] is None


@pytest.mark.parametrize("name", VARIANTS)
def test_the_baselines_are_right(name: str) -> None:
    verdicts = speed.check(VARIANTS[name], "softmax", draw((2, 3, 65, 16)), ("out",))
    assert verdicts["out"].ok
    assert VARIANTS[name](*draw((1, 1, 4, 8))).dtype == np.float32


@pytest.mark.usefixtures("small")
def test_a_record_has_every_figure_with_its_target() -> None:
    said: list[str] = []
    record = speed.measure("numpy", quick=True, say=said.append)
    json.dumps(record)
    assert record["red"] is False
    names = [figure["name"] for figure in record["figures"]]
    assert len(names) == len(set(names)) == 9
    for figure in record["figures"]:
        assert figure["at_least"] is not None or figure["at_most"] is not None
        assert figure["met"] in (True, False, None)
        assert np.isfinite(figure["value"])
    first = record["figures"][0]
    assert first["baseline"] in VARIANTS
    assert set(first["variants"]) == set(VARIANTS)
    assert record["environment"]["packages"]["numpy"] == np.__version__
    assert said[0] == "numerics"


@pytest.mark.usefixtures("small")
def test_no_speed_on_red_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = NumpyBackend.attention

    def careless(self: Any, plan: Any, inputs: Any, *, lse: bool = False) -> Any:
        return honest(self, plan, inputs._replace(q=inputs.q * np.float32(1.01)), lse=lse)

    monkeypatch.setattr(NumpyBackend, "attention", careless)
    done = CliRunner().invoke(app, ["bench", "--quick", "--json"])
    assert done.exit_code == Exit.NUMERICS
    record = json.loads(done.stdout)
    assert record["red"] is True
    assert record["figures"] == []
    assert "no speed is reported" in done.stderr
    shown = CliRunner().invoke(app, ["bench", "--quick"])
    assert "interval" not in shown.stdout


@pytest.mark.usefixtures("small")
def test_the_table_never_hides_what_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    unmet = [speed.figure("too slow", 3.0, "x", (None, 1.0))]
    monkeypatch.setattr(speed, "_GROUPS", {"one": lambda *_: unmet})
    done = CliRunner().invoke(app, ["bench", "--quick"])
    assert done.exit_code == 0
    assert "too slow" in done.stdout
    assert "NOT MET" in done.stdout
    strict = CliRunner().invoke(app, ["bench", "--quick", "--strict", "--json"])
    assert strict.exit_code == Exit.UNMET
    assert json.loads(strict.stdout)["figures"][0]["met"] is False
    assert "not met: too slow" in strict.stderr


def test_unknown_backends() -> None:
    done = CliRunner().invoke(app, ["bench", "--backend", "nunpy"])
    assert done.exit_code == Exit.USAGE
    assert "did you mean 'numpy'?" in done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_peak_memory_sees_what_a_call_takes(way: str) -> None:
    found = peak_memory("numpy", (1, 2, 1024, 64), way, 2)
    if found is None:
        pytest.skip("the system does not tell")
    # Something, but less than the scores would take: 2 heads of 1024 x 1024 float32 are 8 MiB.
    assert 0.1 < found < 24


def test_the_environment_names_the_machine() -> None:
    found = environment()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["packages"]["numpy"] == np.__version__


def test_threads_are_limited_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("PDCORE_NUM_THREADS", raising=False)
    with threads_limited(1) as limited:
        assert limited
        assert os.environ["PDCORE_NUM_THREADS"] == "1"
    assert "PDCORE_NUM_THREADS" not in os.environ
