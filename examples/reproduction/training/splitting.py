"""The split of a training part into what is fitted and what validates."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["stratified_split"]

Array = np.ndarray[Any, Any]


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
