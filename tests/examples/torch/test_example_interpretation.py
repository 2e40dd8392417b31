"""Test the example that reads a trained layer as a regression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_modules import example
from reproduction.training import run as training
from reproduction.training import series
from typer.testing import CliRunner

import pdcore
from pdcore.errors import Exit
from pdcore_adapters.time_series import model

# In this order: each module imports those before it.
example("comparison")
example("interpretation_picture")
command = example("interpret_attention")


def ran(*arguments: str) -> Any:
    return CliRunner().invoke(command.app, list(arguments))


def test_the_arrays_are_those_of_the_layer() -> None:
    run = training.Run(model.Settings(spec="bn(beta=param)"), series.packaged())
    q, k, v, params = command.layer_arrays(run, 1, 5)
    length = int(run.series.test.lengths[5])
    assert q.shape == k.shape == v.shape == (4, length, 16)
    attention = run.averaged.layers[1].attention
    seen: list[Any] = []
    hook = attention.outward.register_forward_hook(
        lambda module, options, out: seen.append(options[0])
    )
    frames = torch.from_numpy(run.series.test.frames[5:6, :length]).double()
    with torch.no_grad():
        run.averaged(frames, torch.ones(1, length, dtype=torch.bool))
    hook.remove()
    result = pdcore.attention(q, k, v, "bn(beta=param)", params=params)
    inside = seen[0].numpy().reshape(length, 4, 16).swapaxes(0, 1)
    np.testing.assert_allclose(result, inside, rtol=1e-10, atol=1e-12)


def test_the_command_writes_a_picture_and_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SHARES", (0.1, 1.0))
    options = ["--epochs", "1", "--spec", "sh(1,1,2,2)", "--layer", "2", "--utterance", "3"]
    run = ran(*options, "--out", str(tmp_path), "--json")
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert result["certified"] is True
    assert np.shape(result["support"]) == (4, result["frames"])
    counts = np.array(list(result["counts"].values()))
    assert list(result["counts"]) == ["0.1", "0.3", "1.0"]
    assert np.array_equal(counts[1], np.sum(result["support"], axis=1))
    assert np.all(counts[2] <= counts[0])
    assert (tmp_path / "interpretation.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = tmp_path / "softmax+sh(1,1,2,2)-seed0.pt"
    again = ran(*options, "--out", str(tmp_path / "b"), "--checkpoint", str(checkpoint))
    assert again.exit_code == 0, again.output
    assert "tokens are support vectors" in again.stdout
    written = json.loads((tmp_path / "b" / "interpretation.json").read_text())
    assert written["C"] == result["C"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--epsilon", "0"], Exit.USAGE, "got 0.0, expected a number above 0"),
        (["--utterance", "370"], Exit.USAGE, "one of the 370 of the test part"),
        (["--spec", "sofmax"], Exit.USAGE, "did you mean 'softmax'"),
        (["--checkpoint", "none.pt"], Exit.INPUT, "none.pt"),
    ],
)
def test_wrong_options(
    arguments: list[str], code: Exit, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ran(*arguments)
    assert run.exit_code == int(code)
    assert message in " ".join(run.stderr.replace("│", " ").split())
