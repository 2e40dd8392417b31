"""Corpora of short answers: questions, reference answers, and answers that are correct or not."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pdcore.cli.files import FileError

__all__ = ["CORRECT", "SPLITS", "Answer", "Corpus", "groups", "read_corpora", "split", "words_of"]

Array = np.ndarray[Any, Any]

#: The score, of 5, from which an answer counts as correct.
CORRECT = 4.0

#: What is held out: answers to questions that are trained on, or questions with all answers.
SPLITS = ("answers", "questions")

#: Words, with negations and other endings apart, as the vectors have them, and numbers.
_WORD = re.compile(r"[a-z]+(?=n't)|n't|'[a-z]+|[a-z]+|\d+")


class Answer(NamedTuple):
    """One answer.

    Attributes
    ----------
    question, reference, answer : str
        As the file writes them.
    correct : bool
    """

    question: str
    reference: str
    answer: str
    correct: bool


class Corpus(NamedTuple):
    """The answers of one file, and its name without the ending."""

    name: str
    answers: list[Answer]


def read_corpora(folder: Path) -> list[Corpus]:
    """Read every ``.csv`` file of a folder.

    The columns are ``question``, ``reference_answer``, ``answer``, and ``correct``, 0 or 1, or
    ``score``, of which `CORRECT` and more count as correct. Other columns are not read.

    Raises
    ------
    FileError
        For a folder without such files, and for a file that is not as described.
    """
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise FileError(f"{folder}: expected a folder with .csv files, found none")
    return [Corpus(path.stem, _read(path)) for path in paths]


def _read(path: Path) -> list[Answer]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            present = rows.fieldnames or []
            lacking = {"question", "reference_answer", "answer"} - set(present)
            if lacking or not {"correct", "score"} & set(present):
                raise FileError(
                    f"{path}: got the columns {', '.join(present)}; expected question, "
                    "reference_answer, answer, and correct or score"
                )
            answers = [_answer(f"{path}, line {rows.line_num}", row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path}: {error}") from error
    if len({answer.correct for answer in answers}) < 2:
        raise FileError(f"{path}: expected answers that are correct and others, found one kind")
    for kind in SPLITS:
        if len(set(groups(answers, kind))) < 3:
            raise FileError(f"{path}: expected at least three different {kind}, for three parts")
    return answers


def _answer(where: str, row: dict[str, str | None]) -> Answer:
    texts = [row[name] or "" for name in ("question", "reference_answer", "answer")]
    if not all(map(words_of, texts)):
        raise FileError(f"{where}: a question, reference or answer without words")
    name = "correct" if "correct" in row else "score"
    try:
        value = float(row[name] or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) if name == "score" else value in (0.0, 1.0)):
        expected = "a number" if name == "score" else "0 or 1"
        raise FileError(f"{where}: {name}: got {row[name]!r}, expected {expected}")
    return Answer(*texts, value >= CORRECT if name == "score" else value == 1.0)


def words_of(text: str) -> list[str]:
    """Return the words and numbers of a text, in small letters."""
    return _WORD.findall(text.lower())


def groups(answers: Sequence[Answer], kind: str) -> list[Hashable]:
    """Return what must not be divided by a split: the question, or the words answered to it."""
    if kind == "questions":
        return [answer.question for answer in answers]
    return [(answer.question, *words_of(answer.answer)) for answer in answers]


def split(members: Sequence[Hashable], share: float, seed: int) -> tuple[Array, Array, Array]:
    """Divide into a part to fit, one to validate and one to test, group by group.

    Parameters
    ----------
    members : sequence
        The group of each answer.
    share : float
        The share of the groups that validates, and the share that tests; at least one group each.
    seed : int
        The seed, on which alone the split depends.

    Returns
    -------
    fit, validation, test : int array
        Sorted indices into `members`.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(members))}
    order = np.random.default_rng(seed).permutation(len(numbers))
    held = max(1, round(share * len(numbers)))
    part = np.zeros(len(numbers), dtype=np.int64)
    part[order[:held]], part[order[held : 2 * held]] = 2, 1
    of_answer = part[[numbers[group] for group in members]]
    fit, validation, test = (np.flatnonzero(of_answer == number) for number in range(3))
    return fit, validation, test
