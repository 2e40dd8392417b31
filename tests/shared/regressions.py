"""Regression problems on real data, and kernel matrices by formulas independent of pdcore."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdcore.datasets import japanese_vowels

__all__ = ["explicit", "next_frames", "pooled", "vowels"]

Array = np.ndarray[Any, Any]


def vowels(count: int) -> list[Array]:
    """Return utterances of recorded vowels, (frames, 12), standardized by the training part."""
    recordings = japanese_vowels()
    train = recordings.frames[recordings.train][recordings.real[recordings.train]].astype(
        np.float64
    )
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    return [
        (recordings.frames[i, : recordings.lengths[i]] - mean) / deviation for i in range(count)
    ]


def next_frames(count: int, outputs: int) -> tuple[Array, Array]:
    """Return frames (M, 12), and the first channels of the next frames, (M, outputs)."""
    series = vowels(count)
    keys = np.concatenate([x[:-1] for x in series])
    return keys, np.concatenate([x[1:, :outputs] for x in series])


def pooled(x: Array, scale: int) -> Array:
    """Return the means of consecutive windows, of which the last may be short."""
    return np.stack([x[a : a + scale].mean(axis=0) for a in range(0, len(x), scale)])


def explicit(
    kernel: str, x: Array, keys: Array, *, bn: bool = False, h: str = "sum", sink: float = -np.inf
) -> Array:
    """Return kappa(T(x), T(k)) / (h(x) h(k)), (N, M), for kernels with default arguments."""
    if bn:
        mean, deviation = keys.mean(axis=0), np.sqrt(keys.var(axis=0) + 1e-5)
        x, keys = (x - mean) / deviation, (keys - mean) / deviation

    def kappa(a: Array, b: Array) -> Array:
        inner = a @ b.T
        if kernel == "softmax":
            return np.exp(inner / np.sqrt(a.shape[1]))
        if kernel == "gaussian(gamma=0.05)":
            return np.exp(-0.05 * ((a[:, None] - b[None]) ** 2).sum(axis=-1))
        if kernel == "cosine":
            lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
            return np.exp(inner / lengths)
        if kernel == "polynomial":
            return (inner / np.sqrt(a.shape[1]) + 1.0) ** 2
        assert kernel == "linear"
        phi = [np.where(z < 0, np.exp(np.minimum(z, 0.0)), z + 1.0) for z in (a, b)]
        return phi[0] @ phi[1].T

    def total(a: Array) -> Array:
        if h == "sum":
            return kappa(a, keys).sum(axis=1) + np.exp(sink)
        return np.full(len(a), {"one": 1.0, "count": float(len(keys))}[h])

    return kappa(x, keys) / np.outer(total(x), total(keys))
