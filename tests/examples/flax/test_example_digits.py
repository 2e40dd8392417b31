"""Test the example that trains on digits with Flax and Optax."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from example_modules import example
from typer.testing import CliRunner

from pdcore.errors import Exit
from pdcore_adapters.time_series.arrays import stratified_split

# In this order: each module imports those before it.
example("comparison")
training = example("digits_training")
example("training_picture")
command = example("classify_digits")


@pytest.fixture(scope="module")
def digits() -> Any:
    return training.load()


def small(**options: Any) -> Any:
    sizes = {"epochs": 4, "patience": 4, "width": 16, "layers": 1, "rate": 1e-2}
    return training.Settings(**sizes | options)


def test_a_fifth_of_each_class_is_the_test_part(digits: Any) -> None:
    assert len(digits.train) + len(digits.test) == 1797
    both = [np.bincount(t, minlength=10) for t in (digits.train_targets, digits.test_targets)]
    np.testing.assert_allclose(both[1] / (both[0] + both[1]), 0.2, atol=0.005)
    seen = {image.tobytes() for image in digits.train}
    assert not any(image.tobytes() in seen for image in digits.test)
    np.testing.assert_allclose([digits.train.mean(), digits.train.std()], [0.0, 1.0], atol=1e-4)
    again = training.load()
    assert all(np.array_equal(a, b) for a, b in zip(again, digits, strict=True))


def test_images_move_by_one_pixel_at_most(digits: Any) -> None:
    images = digits.train[:40]
    moved = np.asarray(training._shifted(images, jax.random.key(0)))
    background = images.min()
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=background)
    ways = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    result = np.stack([(moved == way).all((1, 2)) for way in ways])
    assert result.any(0).all()
    assert result.any(1).sum() > 4


def test_training_learns_and_is_repeatable(digits: Any) -> None:
    shares: list[float] = []
    model, result = training.fit(small(), digits, shares.append)
    assert result["test_accuracy"] > 0.5  # chance is one in ten
    assert result["test_correct"] == round(result["test_accuracy"] * len(digits.test))
    losses = [epoch["loss"] for epoch in result["history"]]
    assert result["epoch"] == 1 + int(np.argmin(losses))
    assert losses[-1] < losses[0]
    assert shares == [0.25, 0.5, 0.75, 1.0]
    # The model that is returned is the one that was tested.
    right = training.predict(model, digits.test).argmax(1) == digits.test_targets
    assert int(right.sum()) == result["test_correct"]
    # Other test images change nothing but the test accuracy.
    other = digits._replace(test=digits.test[:50], test_targets=digits.test_targets[:50])
    again = training.fit(small(), other)[1]
    for name in ("history", "epoch", "validation_accuracy"):
        assert again[name] == result[name]
    assert training.fit(small(seed=1, epochs=1), digits)[1]["history"] != result["history"][:1]


@pytest.mark.nightly
def test_training_stops_early_with_the_best_weights(digits: Any) -> None:
    # The rate is so large that the loss soon gets worse.
    model, result = training.fit(small(epochs=30, patience=2, rate=0.3), digits)
    assert result["epochs"] == result["epoch"] + 2 < 30
    held = stratified_split(digits.train_targets, 0.2, 0)[1]
    actual = training._validate(model, digits.train[held], digits.train_targets[held], 0)
    assert actual == result["history"][result["epoch"] - 1]


# --- the command ------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    args = [str(a) for a in arguments]
    return CliRunner().invoke(command.app, args, env={"COLUMNS": "300"})


@pytest.mark.nightly
def test_the_command_compares_specs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (
        "--out",
        out,
        "--epochs",
        1,
        "--width",
        16,
        "--layers",
        1,
        "--rate",
        0.01,
        "--spec",
        "softmax",
        "--spec",
        "bn+sh(1,1,2,2)",
        "--seeds",
        "0,1",
    )
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    actual = json.loads(result.stdout)
    assert [row["spec"] for row in actual["summary"]] == ["softmax", "softmax+bn+sh(1,1,2,2)"]
    for row in actual["summary"]:
        accuracies = [r["test_accuracy"] for r in actual["runs"] if r["spec"] == row["spec"]]
        assert row["test_accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    assert json.loads((out / "results.json").read_text()) | {"files": actual["files"]} == actual
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert run(*arguments).exit_code == Exit.OUTPUT
    again = run(*arguments, "--force")
    assert again.exit_code == 0, again.stderr
    for words in ("Digits: 1438 training and 359 test images", "seeds 0, 1", "wrote", "CC BY 4.0"):
        assert words in again.stdout
    assert "seed 1: epoch 1 of 1 chosen" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--spec", "sofmax"], Exit.USAGE, "--spec: .*sofmax.*did you mean 'softmax'"),
        (["--spec", "sh(1,2)"], Exit.USAGE, r"--spec: softmax\+sh\(1,2\): .*4 heads"),
        (["--spec", "causal+bn"], Exit.UNSUPPORTED, r"--spec causal\+bn: .*future"),
        (["--spec", "bn(beta=param)"], Exit.UNSUPPORTED, "--spec .*param.*: .*takes the arrays"),
        (["--spec", "bn", "--spec", "softmax+bn"], Exit.USAGE, r"--spec: softmax\+bn is .*twice"),
        (["--seeds", "0,one"], Exit.USAGE, "--seeds: got '0,one'"),
        (["--heads", "5"], Exit.USAGE, "--heads: 5 heads do not divide width 64"),
        (["--validation", "1"], Exit.USAGE, "--validation: got 1.0"),
        (["--rate", "nan"], Exit.USAGE, "--rate: got nan"),
        (["--batch", "1200"], Exit.USAGE, "--batch: got 1200, expected at most the 11"),
    ],
)
def test_errors_name_the_argument(
    arguments: list[str], code: Exit, words: str, tmp_path: Path
) -> None:
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert re.search(words, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()
