"""The recorded vowels as queries, keys and values, and the presets that the demo compares."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pdcore.datasets import JapaneseVowels

__all__ = ["PRESETS", "SEED", "Batch", "project"]

Array = np.ndarray[Any, Any]

#: The presets, with numbers that suit utterances of at most 29 frames and four heads.
PRESETS: dict[str, str] = {
    "softmax": "scaled dot-product attention",
    "linear": "feature map elu + 1, O(N + M)",
    "sparse(4,4)": "softmax over 4 frames to either side",
    "bn": "Attention-BN",
    "sh(1,1,2,2)": "Attention-SH: heads 3 and 4 see pairs of frames",
    "bn+sh(1,1,2,2)": "Attention-BN+SH",
    "causal+bn(statistics=prefix)": "causal Attention-BN, statistics of the past only",
}

HEADS, DIM, SEED = 4, 8, 0


class Batch(NamedTuple):
    """All utterances as one padded call.

    Attributes
    ----------
    q, k, v : float32 array (640, HEADS, 29, DIM)
    key_mask : bool array (640, 29)
        True for a frame, False for padding.
    """

    q: Array
    k: Array
    v: Array
    key_mask: Array


def project(vowels: JapaneseVowels) -> Batch:
    """Return queries, keys and values of the frames by fixed random maps.

    Each of the 12 channels is standardised by the training part's mean and deviation, then
    mapped to `HEADS` heads of `DIM` features by three Gaussian matrices (12, HEADS * DIM) of
    variance 1/12 and seed `SEED`. Nothing is trained, so the weights show what a spec does to a
    head, not what a model learns.

    Examples
    --------
    >>> project(japanese_vowels()).q.shape
    (640, 4, 29, 8)
    """
    frames = vowels.frames[vowels.train][vowels.real[vowels.train]].astype(np.float64)
    standard = (vowels.frames - frames.mean(axis=0)) / frames.std(axis=0)
    standard = np.where(vowels.real[..., None], standard, 0.0)
    channels = vowels.frames.shape[-1]
    maps = np.random.default_rng(SEED).standard_normal((3, channels, HEADS * DIM)) / channels**0.5
    count, length = vowels.real.shape
    q, k, v = (
        np.ascontiguousarray(
            (standard @ m).reshape(count, length, HEADS, DIM).swapaxes(1, 2).astype(np.float32)
        )
        for m in maps
    )
    return Batch(q, k, v, vowels.real)
