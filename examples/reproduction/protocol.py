"""What is measured: the grids, and the cells that they consist of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

__all__ = ["BASELINE", "DATA", "GRIDS", "MEASURES", "SPECS", "Cell", "Grid", "cells", "protocol"]

#: Everything is measured beside it.
BASELINE = "softmax"
SPECS = ("softmax+bn", "softmax+sh(1,1,2,2)", "softmax+bn+sh(1,1,2,2)")

#: By the names of the archive; the first and the last need no path.
DATA = ("JapaneseVowels", "UWaveGestureLibrary", "Handwriting", "Digits")

#: Mean L2 distance of two heads' maps (N, M), of their outputs (N, Dv), and of their outputs over
#: the mean norm of them.
MEASURES = ("maps", "outputs", "relative")


@dataclass(frozen=True)
class Grid:
    """A protocol, apart from the specs.

    Attributes
    ----------
    name : str
    seeds : tuple of int
        Of split, first weights and everything drawn while training.
    epochs, patience : int
        As in `reproduction.training.model.Settings`.
    thin : tuple of (str, int)
        Data sets of which every k-th step is taken.
    sizes : tuple of (int, int)
        Sequence length N and features D of a head, for time, memory and FLOPs.
    rounds : int
        Steps of each spec that are timed, in turn.
    repeats : int
        Processes that measure the memory of one step.
    shown : int
        Test series, evenly spread, whose heads are compared.
    """

    name: str
    seeds: tuple[int, ...]
    epochs: int
    patience: int
    thin: tuple[tuple[str, int], ...]
    sizes: tuple[tuple[int, int], ...]
    rounds: int
    repeats: int
    shown: int


GRIDS = {
    "quick": Grid(
        name="quick",
        seeds=(0, 1, 2),
        epochs=60,
        patience=8,
        thin=(("UWaveGestureLibrary", 6), ("Handwriting", 3)),
        sizes=((128, 16), (512, 16), (2048, 16), (512, 64), (512, 128)),
        rounds=7,
        repeats=3,
        shown=60,
    ),
    "full": Grid(
        name="full",
        seeds=(0, 1, 2, 3, 4),
        epochs=150,
        patience=30,
        thin=(),
        sizes=(
            (128, 16),
            (512, 16),
            (2048, 16),
            (4096, 16),
            (8192, 16),
            (2048, 32),
            (2048, 64),
            (2048, 128),
        ),
        rounds=15,
        repeats=5,
        shown=200,
    ),
}


class Cell(NamedTuple):
    """One measurement, which is made, kept and skipped as a whole.

    Attributes
    ----------
    kind : {"train", "memory", "flops", "time"}
    spec : str
        "" for times: those of all specs are taken in turn.
    data : str
        "" for what has no data.
    seed : int
        Of a training, or which repetition.
    length, dim : int
        N and D; 0 for trainings.
    """

    kind: str
    spec: str = ""
    data: str = ""
    seed: int = 0
    length: int = 0
    dim: int = 0

    @property
    def name(self) -> str:
        """Name it in files and messages."""
        where = self.data or f"N={self.length} D={self.dim}"
        last = {"train": f"seed {self.seed}", "memory": f"repeat {self.seed}"}.get(self.kind, "")
        return " ".join(word for word in (self.kind, where, self.spec, last) if word)


def cells(grid: Grid, specs: Sequence[str], data: Sequence[str]) -> Iterator[Cell]:
    """Give all cells, the seeds one after another, so that an early end leaves whole seeds.

    Parameters
    ----------
    grid : Grid
    specs : sequence of str
        The baseline among them.
    data : sequence of str
        The data sets that are at hand.
    """
    for seed in grid.seeds:
        for name in data:
            for spec in specs:
                yield Cell("train", spec, name, seed)
    for repeat in range(grid.repeats):
        for length, dim in grid.sizes:
            for spec in specs:
                yield Cell("memory", spec, seed=repeat, length=length, dim=dim)
    for length, dim in grid.sizes:
        for spec in specs:
            yield Cell("flops", spec, length=length, dim=dim)
        yield Cell("time", length=length, dim=dim)


def protocol(grid: Grid, specs: Sequence[str]) -> dict[str, Any]:
    """Give all that decides the figures beside data and versions, as JSON has it."""
    from .cost import BATCH, CHANNELS
    from .training.model import Settings

    settings = {
        name: value
        for name, value in asdict(Settings()).items()
        if name not in ("spec", "seed", "epochs", "patience")
    }
    found = asdict(grid) | {
        "specs": list(specs),
        "settings": settings,
        "batch_of_a_step": BATCH,
        "channels_of_a_step": CHANNELS,
        "threads": 1,
    }
    return {
        name: [list(v) if isinstance(v, tuple) else v for v in value]
        if isinstance(value, tuple)
        else value
        for name, value in found.items()
    }
