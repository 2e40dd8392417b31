"""The data sets: how each is read, and why one is not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pdcore.cli.files import FileError
from pdcore.errors import nearest

from .protocol import DATA, Grid
from .training.series import Pair, Series, digits, find_pair, packaged, pair, read_ts

__all__ = ["absent", "load", "thinned"]

#: Data sets that are never measured, with the reason.
ABSENT = {
    "ImageNet": "its images are not at hand, and a model of its size does not train on a CPU",
}
_WITHOUT_PATH = {"JapaneseVowels": packaged, "Digits": digits}


def load(folders: Sequence[Path], grid: Grid) -> dict[str, Pair]:
    """Read the available data sets, in the order of `DATA`.

    Parameters
    ----------
    folders : sequence of Path
        Folders of the UEA archive, each of one data set or of several.
    grid : Grid
        The grid, which decides the steps that are used.

    Raises
    ------
    FileError
        When a folder is missing, holds none of the data sets, or a file is damaged.
    """
    folder_of: dict[str, Path] = {}
    for folder in folders:
        for name, place in _within(folder):
            if name in folder_of:
                raise FileError(f"{folder}: {name} is in {folder_of[name]} too")
            folder_of[name] = place
    every = dict(grid.thin)
    loaded = {}
    for name in DATA:
        if name in _WITHOUT_PATH:
            read = _WITHOUT_PATH[name]()
        elif name in folder_of:
            train, test = find_pair(folder_of[name])
            source = f"{name}, UEA archive: {train.name}, {test.name}"
            read = pair(name, read_ts(train), read_ts(test), source)
        else:
            continue
        loaded[name] = read._replace(
            name=name,
            train=thinned(read.train, every.get(name, 1)),
            test=thinned(read.test, every.get(name, 1)),
        )
    return loaded


def _within(folder: Path) -> Iterable[tuple[str, Path]]:
    """Return the data sets in a folder, or the folder itself where it is one."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "no such folder"
        raise FileError(f"{folder}: {what}")
    wanted = [name for name in DATA if name not in _WITHOUT_PATH]
    if any(folder.glob("*.ts")):
        name = folder.resolve().name
        if name not in wanted:
            raise FileError(f"{folder}: unknown data set {name!r}; {nearest(name, wanted)}")
        return [(name, folder)]
    within = [(name, folder / name) for name in wanted if (folder / name).is_dir()]
    if not within:
        raise FileError(f"{folder}: no data set in it; expected {' or '.join(wanted)}")
    return within


def thinned(series: Series, every: int) -> Series:
    """Return series with every k-th step, from the first."""
    if every == 1:
        return series
    return series._replace(frames=series.frames[:, ::every], lengths=-(-series.lengths // every))


def absent(names: Iterable[str]) -> dict[str, str]:
    """Return the reason for every data set that was not measured, and the remedy.

    Parameters
    ----------
    names : iterable of str
        The data sets that were measured.
    """
    missing = [name for name in DATA if name not in names]
    return {
        name: f"not at hand: --data DIR, with {name}/{name}_TRAIN.ts and {name}_TEST.ts of the "
        "UEA archive"
        for name in missing
    } | ABSENT
