"""Test the example that trains a classifier of time series."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_modules import example
from reproduction.training import run as training
from reproduction.training import series as time_series
from typer.testing import CliRunner

from pdcore.cli.files import FileError
from pdcore.errors import Exit
from pdcore_adapters.time_series import model
from pdcore_adapters.time_series.training import predict

# In this order: each module imports those before it.
example("comparison")
example("training_picture")
command = example("classify_time_series")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def part(series: Any, chosen: Any) -> Any:
    labels = tuple(np.array(series.labels)[chosen].tolist())
    return time_series.Series(series.frames[chosen], series.lengths[chosen], labels)


@pytest.fixture(scope="module")
def vowels() -> Any:
    """Return four speakers, with twelve utterances each to train and all of the test part."""
    whole = time_series.packaged()
    train, test = (whole.targets(p) for p in (whole.train, whole.test))
    first = np.concatenate([np.flatnonzero(train == c)[:12] for c in range(4)])
    return time_series.pair(
        "four speakers", part(whole.train, first), part(whole.test, test < 4), source="test"
    )


def small(**options: Any) -> Any:
    return model.Settings(**{"epochs": 12, "patience": 12, "batch": 12, "width": 16} | options)


# --- .ts files --------------------------------------------------------------------------------


def as_ts(series: Any, header: str = "") -> str:
    lines = [
        ":".join([*(",".join(map(repr, c)) for c in frames[:n].T.tolist()), label])
        for frames, n, label in zip(series.frames, series.lengths, series.labels, strict=True)
    ]
    return "\n".join(["# series", f"{header}@data", *lines]) + "\n"


HEADER = """@problemName Vowels
@timeStamps false
@missing false
@univariate false
@dimensions 12
@equalLength false
@classLabel true 1 2 3 4
"""


def test_a_file_holds_the_series(vowels: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    path.write_text(as_ts(vowels.train, HEADER))
    result = time_series.read_ts(path)
    np.testing.assert_array_equal(result.lengths, vowels.train.lengths)
    length = result.lengths.max()
    np.testing.assert_array_equal(result.frames, vowels.train.frames[:, :length])
    assert not vowels.train.frames[:, length:].any()
    assert result.labels == vowels.train.labels
    assert result.frames.dtype == np.float32


def test_other_encodings_line_ends_and_blanks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ts"
    text = "#pp 1\xe031\r\n@PROBLEMNAME x\r\n\r\n@Data\r\n1, 2,-3e1:left turn\r\n\r\n4:right\r\n"
    path.write_bytes(text.encode("latin-1"))
    result = time_series.read_ts(path)
    np.testing.assert_array_equal(result.frames[..., 0], [[1.0, 2.0, -30.0], [4.0, 0.0, 0.0]])
    assert result.labels == ("left turn", "right")
    np.testing.assert_array_equal(result.real, [[True, True, True], [True, False, False]])


def test_a_file_cut_anywhere_in_its_series_is_an_error_or_loses_whole_series(
    tmp_path: Path,
) -> None:
    head = "@univariate false\n@dimensions 2\n@equalLength true\n@seriesLength 3\n"
    text = f"{head}@classLabel true aa bb\n@data\n1,2,3:4,5,6:aa\n7,8,9:1,2,3:bb"
    path = tmp_path / "cut.ts"
    path.write_text(text)
    whole = time_series.read_ts(path)
    for end in range(text.index("@data") + 6, len(text)):
        path.write_text(text[:end])
        if text[:end].endswith(("aa", "aa\n")):
            result = time_series.read_ts(path)
            np.testing.assert_array_equal(result.frames, whole.frames[:1])
            continue
        with pytest.raises(FileError, match=re.escape(str(path))):
            time_series.read_ts(path)


GOOD = "1,2:3,4:a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no series, and no @data line"),
        ("@data\n", "no series"),
        (f"{GOOD}\n", ":1: series before @data"),
        (f"@data\n{GOOD}\n1,2:3:a\n", ":3: channel 2 has 1 steps, expected 2"),
        (f"@data\n{GOOD}\n1,2:a\n", ":3: 1 channel, expected 2 as in the first series"),
        (f"@dimensions 3\n@data\n{GOOD}\n", ":3: 2 channels, expected 3 as @dimensions says"),
        ("@dimensions no\n@data\n", ":1: @dimensions says 'no', expected a whole number"),
        (f"@data\n{GOOD}\n1,?:3,4:a\n", ":3: channel 1, step 2: a missing value"),
        (f"@data\n{GOOD}\n1,2:NaN,4:a\n", ":3: channel 2, step 1: a missing value"),
        (f"@data\n{GOOD}\n1,2:3,x:a\n", ":3: channel 2, step 2: got 'x', expected a number"),
        ("@data\n1,,2:a\n", ":2: channel 1, step 2: got '', expected a number"),
        ("@data\n1,1e39:a\n", ":2: channel 1, step 2: got '1e39', expected a number"),
        ("@data\n1,2\n", ":2: no label"),
        ("@data\n1,2:\n", ":2: no label"),
        ("@classLabel true b c\n@data\n1,2:a\n", ":3: label 'a' is not among @classLabel: b c"),
        ("@classLabel false\n@data\n1\n", ":1: the series have no class labels"),
        ("@targetLabel true\n@data\n1:2\n", ":1: regression targets are not supported"),
        ("@timeStamps true\n@data\n(0,1):a\n", ":1: series with time stamps are not supported"),
        ("@missing perhaps\n@data\n1:a\n", ":1: @missing says 'perhaps', expected true or false"),
        (f"@data\n{GOOD}\n@data\n", ":3: @data after @data"),
        ("@univariate true\n@data\n1:2:a\n", ":3: 2 channels, but @univariate says true"),
        ("@univariate false\n@data\n1,2:a\n", ":3: 1 channel, but @univariate says false"),
        ("@seriesLength 3\n@data\n1,2:a\n", ":3: 2 steps, expected 3 as @seriesLength says"),
        (
            "@equalLength false\n@seriesLength 1\n@data\n1:a\n1,2:a\n",
            ":5: 2 steps, expected at most 1 as @seriesLength says",
        ),
        ("@seriesLength 0\n@data\n1:a\n", ":1: @seriesLength says '0', expected a whole number"),
        (f"@dimensions {'9' * 5000}\n@data\n1:a\n", ":1: @dimensions says '9999"),
        (
            "@equalLength true\n@data\n1,2:a\n1:a\n",
            ":4: 1 steps, expected 2 as in the first series, because @equalLength says true",
        ),
        ("@missing false\n@data\n1,?:a\n", ":3: channel 1, step 2: a missing value"),
        ("@timeStamps false\n@data\n(0,1):a\n", ":3: channel 1, step 1: got '(0', expected"),
        ("@missing false\n@missing true\n@data\n1:a\n", ":2: @missing is there twice"),
        ("@\n@data\n1\n", ":3: no label"),
    ],
)
def test_damage_names_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.ts"
    path.write_text(text)
    with pytest.raises(FileError, match=re.escape(message)) as caught:
        time_series.read_ts(path)
    assert str(caught.value).startswith(str(path))


def test_classes_are_in_the_order_of_numbers() -> None:
    series = time_series.Series(np.zeros((3, 1, 1)), np.ones(3, int), ("10", "9", "2"))
    assert time_series.pair("", series, series, "").classes == ("2", "9", "10")


# --- a run ------------------------------------------------------------------------------------


def test_training_learns(vowels: Any, tmp_path: Path) -> None:
    shares: list[float] = []
    run = training.Run(small(), vowels)
    result = run.finish(tmp_path / "run.pt", shares.append)
    # Chance is one in four.
    assert result["test_accuracy"] > 0.6
    assert result["test_correct"] == round(result["test_accuracy"] * len(vowels.test.labels))
    assert len(result["history"]) == result["epochs"] == 12
    losses = [epoch["loss"] for epoch in result["history"]]
    assert result["epoch"] == 1 + int(np.argmin(losses))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    # The model that the checkpoint keeps is the one that was tested.
    again = training.Run(small(), vowels)
    again.load(tmp_path / "run.pt")
    assert again.finish() == result
    logits = predict(again.averaged, *training.tensors(vowels, vowels.test)[:2])
    assert logits.argmax(1).tolist().count(0) > 0


def test_the_epoch_is_chosen_without_the_test_part(vowels: Any) -> None:
    """Check that other test series change nothing but the test accuracy."""
    results = []
    for test in (vowels.test, part(vowels.test, slice(0, 3))):
        pair = time_series.pair("", vowels.train, test, "")
        results.append(training.Run(small(epochs=3), pair).finish())
    for name in ("history", "epoch", "validation_accuracy"):
        assert results[0][name] == results[1][name]


# One interruption in each of the two fits, which here take 4 epochs and 1 to 4.
@pytest.mark.parametrize(("spec", "after"), [("softmax", 2), ("bn+sh(1,1,2,2)", 4)])
def test_a_resumed_run_gives_the_same(spec: str, after: int, vowels: Any, tmp_path: Path) -> None:
    settings = small(spec=spec, epochs=4, seed=3)
    whole = training.Run(settings, vowels)
    expected = whole.finish()
    first = training.Run(settings, vowels)
    for _ in range(after):
        first.advance()
    first.save(tmp_path / "run.pt")
    torch.rand(7)  # draws elsewhere must not matter
    second = training.Run(settings, vowels)
    second.load(tmp_path / "run.pt")
    assert second.phase == ("choose" if after < 4 else "refit")
    actual = second.finish()
    assert actual | {"seconds": 0} == expected | {"seconds": 0}
    for a, b in zip(whole.averaged.parameters(), second.averaged.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_something_else_is_refused(vowels: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    training.Run(small(), vowels).save(path)
    with pytest.raises(FileError, match="made with width 16, now it is 32"):
        training.Run(small(width=32), vowels).load(path)
    other = time_series.pair("", vowels.train, part(vowels.test, slice(0, 3)), "")
    with pytest.raises(FileError, match="made from other series"):
        training.Run(small(), other).load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileError, match="not a checkpoint"):
        training.Run(small(), vowels).load(path)
    torch.save([1, 2], path)
    with pytest.raises(FileError, match="not a checkpoint"):
        training.Run(small(), vowels).load(path)


# --- the command ------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    args = [str(a) for a in arguments]
    return CliRunner().invoke(command.app, args, env={"COLUMNS": "300"})


@pytest.fixture
def folder(vowels: Any, tmp_path: Path) -> Path:
    for name, series in (("TRAIN", vowels.train), ("TEST", vowels.test)):
        (tmp_path / f"Four_{name}.ts").write_text(as_ts(series, HEADER))
    return tmp_path


def test_the_command_compares_specs(folder: Path) -> None:
    out = folder / "out"
    arguments = (
        "--data",
        folder,
        "--out",
        out,
        "--epochs",
        2,
        "--width",
        16,
        "--json",
        "--spec",
        "softmax",
        "--spec",
        "bn",
    )
    result = run(*arguments, "--seeds", "0,1")
    assert result.exit_code == 0, result.stderr
    actual = json.loads(result.stdout)
    assert [row["spec"] for row in actual["summary"]] == ["softmax", "softmax+bn"]
    for row in actual["summary"]:
        accuracies = [r["test_accuracy"] for r in actual["runs"] if r["spec"] == row["spec"]]
        assert row["test_accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    assert json.loads((out / "results.json").read_text()) | {"files": actual["files"]} == actual
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert run(*arguments).exit_code == Exit.OUTPUT
    more = run(*arguments, "--seeds", "0,1,2", "--resume")
    assert more.exit_code == 0, more.stderr
    kept = [r for r in json.loads(more.stdout)["runs"] if r["seed"] < 2]
    assert kept == actual["runs"]  # with equal times, so none was repeated


def test_the_table(folder: Path) -> None:
    arguments = ("--data", folder, "--out", folder / "out", "--epochs", 1, "--width", 16)
    result = run(*arguments, "--seeds", "4")
    assert result.exit_code == 0, result.stderr
    for words in ("Four: 48 training and", "seeds 4", "validation", "wrote", "training.png"):
        assert words in result.stdout
    assert "seed 4: epoch 1 of 1 chosen" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--spec", "sofmax"], Exit.USAGE, "--spec: .*sofmax.*did you mean 'softmax'"),
        (["--spec", "sh(1,2)"], Exit.USAGE, r"--spec: softmax\+sh\(1,2\): .*4 heads"),
        (["--spec", "causal+bn"], Exit.UNSUPPORTED, r"--spec causal\+bn: .*future"),
        (["--spec", "bn(statistics=running)"], Exit.UNSUPPORTED, "--spec .*running.*keep mean"),
        (["--spec", "bn", "--spec", "softmax+bn"], Exit.USAGE, r"--spec: softmax\+bn is .*twice"),
        (["--seeds", "0,one"], Exit.USAGE, "--seeds: got '0,one'"),
        (["--seeds", "-1"], Exit.USAGE, "--seeds: got '-1'"),
        (["--seeds", "2,2"], Exit.USAGE, "--seeds: 2 is there twice"),
        (["--heads", "5"], Exit.USAGE, "--heads: 5 heads do not divide width 64"),
        (["--validation", "1"], Exit.USAGE, "--validation: got 1.0"),
        (["--dropout", "-0.1"], Exit.USAGE, "--dropout: got -0.1"),
        (["--noise", "nan"], Exit.USAGE, "--noise: got nan"),
        (["--rate", "0"], Exit.USAGE, "--rate: got 0.0"),
        (["--epochs", "0"], Exit.USAGE, "'--epochs'"),
        (["--resume", "--force"], Exit.USAGE, "--resume: excludes --force"),
        (["--train", "x.ts"], Exit.USAGE, "--test: missing; --train needs it"),
        (["--test", "x.ts"], Exit.USAGE, "--train: missing; --test needs it"),
        (["--data", ".", "--test", "x.ts"], Exit.USAGE, "--data: excludes"),
        (["--data", "nowhere"], Exit.INPUT, "--data: nowhere: no such folder"),
        (["--data", "empty"], Exit.INPUT, r"--data: empty: expected one \*_TRAIN.ts, found none"),
        (["--train", "no.ts", "--test", "no.ts"], Exit.INPUT, "--train: no.ts: No such file"),
        (
            ["--train", "Four_TRAIN.ts", "--test", "bad.ts"],
            Exit.INPUT,
            "--test: bad.ts:2: channel 1, step 2: a missing value",
        ),
        (
            ["--train", "Four_TRAIN.ts", "--test", "narrow.ts"],
            Exit.INPUT,
            "--test: narrow.ts: its series have 1 channels, the training series 12",
        ),
        (["--train", "one.ts", "--test", "one.ts"], Exit.INPUT, "--train: one.ts: one class, a"),
        (["--train", "narrow.ts", "--test", "one.ts"], Exit.INPUT, "--train: .*none can validate"),
        (
            ["--train", "two.ts", "--test", "narrow.ts"],
            Exit.INPUT,
            "--test: narrow.ts: unknown labels c; the training series have a, b",
        ),
    ],
)
def test_errors_name_the_argument(
    arguments: list[str], code: Exit, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    Path("empty").mkdir()
    for name, text in {
        "bad": "1,?:a\n",
        "narrow": "1,2:a\n3,4:b\n5,6:c\n",
        "one": "1,2:a\n3,4:a\n",
        "two": "1,2:a\n3,4:a\n5:b\n6:b\n",
    }.items():
        Path(f"{name}.ts").write_text(f"@data\n{text}")
    result = run(*arguments, "--out", "out")
    assert result.exit_code == code, result.output
    assert re.search(words, result.stderr), result.stderr
    assert not Path("out").exists()


def test_a_loss_that_is_not_finite_ends_it(folder: Path) -> None:
    arguments = ("--data", folder, "--out", folder / "out", "--width", 16, "--rate", "1e30")
    result = run(*arguments, "--seeds", 0)
    assert result.exit_code == Exit.NUMERICS, result.output
    assert "softmax, seed 0: the validation loss is nan" in result.stderr
    assert "--rate" in result.stderr
