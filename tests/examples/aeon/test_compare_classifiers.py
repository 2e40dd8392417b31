"""Test the example that holds the classifier beside ROCKET and 1-NN DTW."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_modules import example
from typer.testing import CliRunner

from pdcore.datasets import japanese_vowels
from pdcore.errors import Exit

# In this order: each module imports those before it.
example("comparison")
command = example("compare_classifiers")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Use one thread, and leave Numba's warnings of aeon's own code aside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with one data set, of two speakers and lengths that differ."""
    vowels = japanese_vowels()
    folder = tmp_path / "UEA" / "Two"
    folder.mkdir(parents=True)
    for name, train in (("TRAIN", True), ("TEST", False)):
        chosen = np.flatnonzero((vowels.train == train) & (vowels.speakers < 3))[::3]
        lines = [
            ":".join(",".join(map(repr, c)) for c in vowels.frames[i, :n].T.tolist())
            + f":{vowels.speakers[i]}"
            for i, n in zip(chosen, vowels.lengths[chosen], strict=True)
        ]
        (folder / f"Two_{name}.ts").write_text("\n".join(["@data", *lines]) + "\n")
    return folder.parent


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(command.app, list(map(str, arguments)), env={"COLUMNS": "200"})


def test_accuracies_are_kept_in_the_file(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "classifiers.json"
    arguments = ("--data", data, "--spec", "linear", "--seeds", "0,1", "--out", out)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    names = ["1-NN DTW", "ROCKET, seed 0", "ROCKET, seed 1", "linear, seed 0", "linear, seed 1"]
    found = record["accuracy"]["Two"]
    assert list(found) == names
    assert all(share > 0.6 for share in found.values())
    assert record["sizes"]["Two"]["channels"] == 12
    assert all(word in result.stdout for word in ("data set", "1-NN DTW", "ROCKET", "linear"))
    mean = 50 * (found["linear, seed 0"] + found["linear, seed 1"])
    assert f"{mean:.1f}" in result.stdout
    # What is there stays as it is.
    record["accuracy"]["Two"]["1-NN DTW"] = 0.123
    out.write_text(json.dumps(record))
    again = run(*arguments)
    assert again.exit_code == 0
    assert "12.3" in again.stdout
    assert again.stderr == ""


def test_what_does_not_fit_is_refused(data: Path, tmp_path: Path) -> None:
    result = run("--data", tmp_path / "nothing")
    assert result.exit_code == Exit.INPUT
    assert "no folder with a NAME_TRAIN.ts in it" in result.stderr
    out = tmp_path / "old.json"
    out.write_text(json.dumps({"versions": {"aeon": "1.0"}, "sizes": {}, "accuracy": {}}))
    result = run("--data", data, "--out", out)
    assert result.exit_code == Exit.INPUT
    assert "made with {'aeon': '1.0'}, here are {'pdcore': " in result.stderr.replace("\n", " ")
    assert json.loads(out.read_text())["accuracy"] == {}
