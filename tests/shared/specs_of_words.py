"""A spec for each word of the grammar, for tests that every adapter runs or refuses each."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdcore.extend import parse
from pdcore.plugins import list_words

#: Specs that fit calls of 4 heads and 6 keys, see `missing_words`.
SPECS = (
    "softmax(softcap=5)",
    "gaussian(0.3)",
    "cosine",
    "polynomial",
    "linear",
    "relu",
    "random_features(8)",
    "identity",
    "bn",
    "bn(beta=param)",
    "bn(statistics=batch)",
    "bn(statistics=running)",
    "bn(statistics=running,with_std=false)",
    "causal+bn(statistics=prefix)",
    "causal+bn(statistics=running)",
    "iebn",
    "iebn(beta=param)",
    "mixture",
    "conv1d",
    "conv2d(2,3)",
    "h(sum,sink=param)",
    "h(count)",
    "h(one)",
    "sh(1,1,2,2)",
    "bn+sh(half=2)",
    "causal",
    "sparse(2,2)",
    "alibi",
    "relative(2)",
    "labels(3)",
)


def needs_arrays(spec: str) -> bool:
    """Return whether a spec takes arrays of the call, which a function has no place for.

    A default that depends on the heads alone, as the slopes of ``alibi``, needs no place.
    """
    return any(not callable(p.default) for p in parse(spec).parameters())


def labels_of(spec: str, asarray: Any, shape: tuple[int, ...]) -> Any:
    """Return the labels that a call of a spec needs, all 0, or None."""
    return asarray(np.zeros(shape, int)) if parse(spec).by_label else None


def missing_words() -> set[str]:
    """Return the words of pdcore that no spec here has."""
    words = {entry["word"] for entry in list_words()["words"]}
    used = {part.partition("(")[0] for spec in SPECS for part in spec.split("+")}
    return words - used
