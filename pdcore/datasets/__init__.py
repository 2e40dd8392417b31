"""Recordings that are shipped with the package, so that the demo needs no network."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

__all__ = ["ATTRIBUTION", "JapaneseVowels", "japanese_vowels"]

#: One line for tables and pages; the full text is in ``ATTRIBUTION.txt`` beside this file.
ATTRIBUTION = (
    "Japanese Vowels: M. Kudo, J. Toyama, M. Shimbo, 1999, UCI Machine Learning Repository, "
    "doi:10.24432/C5NS47, CC BY 4.0; padded and rounded to float32."
)


class JapaneseVowels(NamedTuple):
    """640 utterances of /ae/ by nine speakers.

    Attributes
    ----------
    frames : float32 array (640, 29, 12)
        Cepstrum coefficients, a frame every 6.4 ms; zeros after an utterance's end.
    lengths : int array (640,)
        Frames of each utterance, 7 to 29.
    speakers : int array (640,)
        The class, 1 to 9.
    train : bool array (640,)
        True for the 270 utterances of the training part.
    """

    frames: np.ndarray[Any, np.dtype[np.float32]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    speakers: np.ndarray[Any, np.dtype[np.int64]]
    train: np.ndarray[Any, np.dtype[np.bool_]]

    @property
    def real(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each frame is real, not padding, (640, 29): the `key_mask` of a batch."""
        return np.arange(self.frames.shape[1]) < self.lengths[:, None]


def japanese_vowels() -> JapaneseVowels:
    """Load the Japanese Vowels utterances (Kudo, Toyama and Shimbo, 1999; CC BY 4.0).

    Examples
    --------
    >>> vowels = japanese_vowels()
    >>> vowels.frames.shape, int(vowels.real.sum())
    ((640, 29, 12), 9961)
    """
    with (files(__name__) / "japanese_vowels.npz").open("rb") as stream:
        arrays = np.load(stream, allow_pickle=False)
        return JapaneseVowels(
            arrays["frames"],
            arrays["lengths"].astype(np.int64),
            arrays["speakers"].astype(np.int64),
            arrays["train"],
        )
