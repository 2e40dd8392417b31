"""Labelled time series: UEA ``.ts`` files, the packaged utterances, digits row by row."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pdcore.cli.files import FileError
from pdcore.datasets import ATTRIBUTION, japanese_vowels
from pdcore_adapters.time_series.arrays import real_steps, stack, stratified_split

__all__ = ["DIGITS", "Pair", "Series", "digits", "find_pair", "packaged", "pair", "read_ts"]

Array = np.ndarray[Any, Any]

#: Keywords of a header, in small letters, that are true or false. Unknown keywords are ignored:
#: the files of the archive have several that change nothing.
_SWITCHES = ("timestamps", "missing", "univariate", "equallength", "targetlabel")

#: Keywords, in small letters, that are whole numbers from 1.
_COUNTS = ("dimensions", "serieslength")

LARGEST = float(np.finfo(np.float32).max)

#: The origin of the digits.
DIGITS = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak, 1998, "
    "doi:10.24432/C50P49, CC BY 4.0; the part that comes with scikit-learn."
)


class Series(NamedTuple):
    """Series of one file, padded to the longest.

    Attributes
    ----------
    frames : float32 array (count, length, channels)
        The values; zeros after a series' end.
    lengths : int array (count,)
        Steps of each series, at least 1.
    labels : tuple of str
        The class of each, as the file writes it.
    """

    frames: Array
    lengths: Array
    labels: tuple[str, ...]

    @property
    def real(self) -> Array:
        """Which steps are not padding, (count, length): the `key_mask` of a batch."""
        return real_steps(self.frames, self.lengths)


class Pair(NamedTuple):
    """A training and a test part that fit together.

    Attributes
    ----------
    name : str
        The name in tables and pictures.
    train, test : Series
    classes : tuple of str
        The labels of the training part, sorted; a class is an index into it.
    source : str
        The origin of the series, with the attribution where the package has one.
    """

    name: str
    train: Series
    test: Series
    classes: tuple[str, ...]
    source: str

    def targets(self, part: Series) -> Array:
        """Return the class of each series of a part, (count,) int64."""
        index = {label: i for i, label in enumerate(self.classes)}
        return np.array([index[label] for label in part.labels], dtype=np.int64)

    def digest(self) -> str:
        """Return a hash of both parts, by which a checkpoint recognizes its series."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(repr((part.frames.shape, part.labels)).encode())
            digest.update(part.lengths.astype("<i8").tobytes())
            digest.update(np.ascontiguousarray(part.frames, dtype="<f4").tobytes())
        return digest.hexdigest()


def read_ts(path: Path) -> Series:
    """Read a ``.ts`` file of the UEA archive.

    The file is text: a header of lines that start with ``#`` or ``@``, then one series a line,
    its channels separated by ``:``, the steps of a channel by ``,``, the label last.

    Parameters
    ----------
    path : Path
        Series of one or more channels, of equal or unequal length.

    Returns
    -------
    Series

    Raises
    ------
    FileError
        When the file cannot be read, has time stamps or missing values, a line is damaged, or a
        series is not as the header says. The message names the file and the line.
    """
    try:
        # The comments of some files are in other encodings; numbers and labels are not.
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    header: dict[str, list[str]] = {}
    series: list[Array] = []
    labels: list[str] = []
    begun = False
    for number, line in _lines(text):
        where = f"{path}:{number}"
        if line.startswith("@"):
            if begun:
                raise FileError(f"{where}: {line.split()[0]} after @data")
            begun = _header(where, line, header)
            continue
        if not begun:
            raise FileError(f"{where}: series before @data; is it a .ts file?")
        values, label = _series(where, line, header)
        _check_declared(where, values, series[0] if series else values, header)
        series.append(values)
        labels.append(label)
    if not series:
        raise FileError(f"{path}: no series{'' if begun else ', and no @data line'}")
    return Series(*stack(series), tuple(labels))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not `splitlines`: it also splits at characters that an editor does not count as lines.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip().removeprefix("\ufeff")
        if line and not line.startswith("#"):
            yield number, line


def _header(where: str, line: str, header: dict[str, list[str]]) -> bool:
    """Add one line to the header; return whether it was the last."""
    word, *values = line[1:].split() or [""]
    word = word.lower()
    if word in header:
        raise FileError(f"{where}: @{word} is there twice")
    if word in _SWITCHES and [value.lower() for value in values] not in (["true"], ["false"]):
        raise FileError(f"{where}: @{word} says {' '.join(values)!r}, expected true or false")
    header[word] = values
    on = _says(header, word, "true")
    if word == "timestamps" and on:
        raise FileError(f"{where}: series with time stamps are not supported")
    if word == "targetlabel" and on:
        raise FileError(f"{where}: regression targets are not supported, only classes")
    if word == "classlabel" and not on:
        raise FileError(f"{where}: the series have no class labels")
    if word in _COUNTS and not (len(values) == 1 and re.fullmatch("0*[1-9][0-9]{0,8}", values[0])):
        raise FileError(
            f"{where}: {line.split()[0]} says {' '.join(values)!r}, expected a whole number from 1"
        )
    return word == "data"


def _says(header: dict[str, list[str]], word: str, answer: str) -> bool:
    return [value.lower() for value in header.get(word, [])[:1]] == [answer]


def _check_declared(where: str, values: Array, first: Array, header: dict[str, list[str]]) -> None:
    """Raise where a series is not as the header, or the first series of the file, says."""
    length, channels = values.shape
    count = f"{channels} channel{'s' if channels > 1 else ''}"
    dimensions, steps = (int(header[word][0]) if word in header else None for word in _COUNTS)
    if dimensions is not None and channels != dimensions:
        raise FileError(f"{where}: {count}, expected {dimensions} as @dimensions says")
    for answer, fits in (("true", channels == 1), ("false", channels > 1)):
        if _says(header, "univariate", answer) and not fits:
            raise FileError(f"{where}: {count}, but @univariate says {answer}")
    if channels != first.shape[1]:
        raise FileError(f"{where}: {count}, expected {first.shape[1]} as in the first series")
    # Where lengths differ, @seriesLength is that of the longest.
    unequal = _says(header, "equallength", "false")
    if steps is not None and (length > steps if unequal else length != steps):
        bound = "at most " if unequal else ""
        raise FileError(f"{where}: {length} steps, expected {bound}{steps} as @seriesLength says")
    if _says(header, "equallength", "true") and length != len(first):
        raise FileError(
            f"{where}: {length} steps, expected {len(first)} as in the first series, because "
            "@equalLength says true"
        )


def _series(where: str, line: str, header: dict[str, list[str]]) -> tuple[Array, str]:
    """Read one line: the values (length, channels), and the label."""
    *channels, label = line.split(":")
    label = label.strip()
    known = header.get("classlabel", [])[1:]
    if known and label not in known:
        raise FileError(f"{where}: label {label!r} is not among @classLabel: {' '.join(known)}")
    if not label or not channels:
        raise FileError(f"{where}: no label; expected channels and a label, separated by ':'")
    rows = [_channel(f"{where}: channel {i}", c) for i, c in enumerate(channels, 1)]
    for i, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise FileError(
                f"{where}: channel {i} has {len(row)} steps, expected {len(rows[0])} as in channel "
                "1"
            )
    return np.array(rows, dtype=np.float32).T, label


def _channel(where: str, text: str) -> list[float]:
    row = []
    for step, word in enumerate(text.split(","), 1):
        try:
            value = float(word) if "_" not in word else None
        except ValueError:
            value = None
        if word.strip() == "?" or (value is not None and np.isnan(value)):
            raise FileError(f"{where}, step {step}: a missing value; these are not supported")
        # A float64 that float32 cannot hold would become an infinity.
        if value is None or not abs(value) <= LARGEST:
            raise FileError(f"{where}, step {step}: got {word.strip()!r}, expected a number")
        row.append(value)
    return row


def packaged() -> Pair:
    """Return the Japanese Vowels utterances that come with pdcore: 270 to train, 370 to test."""
    vowels = japanese_vowels()
    train, test = (
        Series(
            vowels.frames[chosen],
            vowels.lengths[chosen],
            tuple(map(str, vowels.speakers[chosen].tolist())),
        )
        for chosen in (vowels.train, ~vowels.train)
    )
    return pair("Japanese Vowels", train, test, source=ATTRIBUTION)


def digits() -> Pair:
    """Return the 8 x 8 digits of scikit-learn, a step for each row: 1438 to train, 359 to test.

    scikit-learn has no test part; this one, a fifth of each class, does not depend on the run.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train, test = (
        Series(
            bunch.images[chosen].astype(np.float32),
            np.full(len(chosen), bunch.images.shape[1]),
            tuple(map(str, bunch.target[chosen].tolist())),
        )
        for chosen in stratified_split(bunch.target, 0.2, seed=0)
    )
    return pair("Digits", train, test, source=DIGITS)


def find_pair(folder: Path) -> tuple[Path, Path]:
    """Find the one ``*_TRAIN.ts`` of a folder and the ``*_TEST.ts`` beside it.

    Raises
    ------
    FileError
        When the folder holds none, or several.
    """
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder"
        raise FileError(f"{folder}: {what}")
    paths = []
    for part in ("TRAIN", "TEST"):
        files = sorted(p for p in folder.glob("*.ts") if p.stem.upper().endswith(f"_{part}"))
        if len(files) != 1:
            names = ", ".join(p.name for p in files) or "none"
            raise FileError(f"{folder}: expected one *_{part}.ts, found {names}")
        paths.append(files[0])
    return paths[0], paths[1]


def pair(name: str, train: Series, test: Series, source: str) -> Pair:
    """Return a training and a test part as a pair.

    Raises
    ------
    FileError
        When the channels differ, or the test part has a label that the training part has not.
    """
    channels = [part.frames.shape[2] for part in (train, test)]
    if channels[0] != channels[1]:
        raise FileError(
            f"its series have {channels[1]} channels, the training series {channels[0]}"
        )
    classes = tuple(sorted(set(train.labels), key=_order))
    unknown = sorted(set(test.labels) - set(classes), key=_order)
    if unknown:
        raise FileError(
            f"unknown labels {', '.join(unknown)}; the training series have {', '.join(classes)}"
        )
    return Pair(name, train, test, classes, source)


def _order(label: str) -> tuple[float, str]:
    # 10 after 9, where labels are numbers.
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label
