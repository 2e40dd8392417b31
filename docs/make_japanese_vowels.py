"""Make `pdcore/datasets/japanese_vowels.npz` from the two files of the UEA edition.

    python docs/make_japanese_vowels.py JapaneseVowels_TRAIN.ts JapaneseVowels_TEST.ts OUT.npz

The files are text: a header of lines that start with ``#`` or ``@``, then one utterance a line,
its 12 channels separated by ``:``, the frames of a channel by ``,``, the speaker last. Nothing is
changed but the form: the numbers are rounded to float32, shorter utterances are padded with zeros,
and the training part comes before the test part, each in its order in the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def read(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """Read one file.

    Parameters
    ----------
    path : Path
        A ``.ts`` file of utterances of unequal length.

    Returns
    -------
    frames : list of array (length, channels)
    speakers : list of int
    """
    frames, speakers = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line[0] in "#@":
            continue
        *channels, speaker = line.split(":")
        frames.append(np.array([c.split(",") for c in channels], dtype=np.float64).T)
        speakers.append(int(speaker))
    return frames, speakers


def make(train: Path, test: Path, out: Path) -> None:
    """Write both parts to one compressed file without pickles."""
    parts = [read(train), read(test)]
    utterances = [x for frames, _ in parts for x in frames]
    lengths = np.array([len(x) for x in utterances], dtype=np.uint8)
    padded = np.zeros((len(utterances), lengths.max(), utterances[0].shape[1]), dtype=np.float32)
    for row, x in zip(padded, utterances, strict=True):
        row[: len(x)] = x
    np.savez_compressed(
        out,
        frames=padded,
        lengths=lengths,
        speakers=np.array([s for _, speakers in parts for s in speakers], dtype=np.uint8),
        train=np.arange(len(utterances)) < len(parts[0][0]),
    )


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
