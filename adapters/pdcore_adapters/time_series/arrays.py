"""Series as padded arrays, their patches, and the split into what is fitted and what validates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["patched", "real_steps", "stack", "stratified_split"]

Array = np.ndarray[Any, Any]


def stack(series: Sequence[Array]) -> tuple[Array, Array]:
    """Pad series (length, channels) with zeros to the longest.

    Returns
    -------
    frames : float32 array (count, length, channels)
    lengths : int64 array (count,)
        Steps of each series.
    """
    lengths = np.array([len(x) for x in series], dtype=np.int64)
    frames = np.zeros((len(series), lengths.max(), series[0].shape[1]), dtype=np.float32)
    for row, x in zip(frames, series, strict=True):
        row[: len(x)] = x
    return frames, lengths


def real_steps(frames: Array, lengths: Array) -> Array:
    """Return which steps are not padding, bool (count, length): the `key_mask` of a batch."""
    steps: Array = np.arange(frames.shape[1]) < lengths[:, None]
    return steps


def patched(frames: Array, lengths: Array, size: int) -> tuple[Array, Array]:
    """Join every `size` steps into one token, whose channels are theirs; zeros fill the last.

    Parameters
    ----------
    frames : array (count, length, channels)
    lengths : int array (count,)
    size : int

    Returns
    -------
    frames : array (count, tokens, size * channels)
    lengths : int array (count,)
        Tokens of each series.
    """
    count, length, channels = frames.shape
    frames = np.pad(frames, ((0, 0), (0, -length % size), (0, 0)))
    return frames.reshape(count, -1, size * channels), -(-lengths // size)


def stratified_split(targets: Array, share: float, seed: int) -> tuple[Array, Array]:
    """Split into a part to fit and a part to validate, class by class.

    Parameters
    ----------
    targets : int array (count,)
        The class of each series.
    share : float
        The share of each class that validates, rounded, and at least one series. A class with a
        single series is only fitted.
    seed : int
        The seed, on which alone the split depends.

    Returns
    -------
    fit, validation : int array
        Sorted indices into `targets`.
    """
    generator = np.random.default_rng(seed)
    fit, validation = [], []
    for target in np.unique(targets):
        members = generator.permutation(np.flatnonzero(targets == target))
        held = min(max(1, round(share * len(members))), len(members) - 1)
        validation += members[:held].tolist()
        fit += members[held:].tolist()
    return np.sort(np.array(fit, dtype=np.int64)), np.sort(np.array(validation, dtype=np.int64))
