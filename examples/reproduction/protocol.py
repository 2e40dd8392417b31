"""The measurements: grids, and their cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

__all__ = ["BASELINE", "DATA", "GRIDS", "MEASURES", "SPECS", "Cell", "Grid", "cells", "protocol"]

#: The attention that all others are compared with.
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
        Seeds of the split, the first weights and all random numbers of the training.
    epochs, patience : int
        As in `reproduction.training.model.Settings`.
    thin : tuple of (str, int)
        Data sets of which only every k-th step is used, with k.
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
    """One measurement, which is computed, kept and skipped as a whole.

    Attributes
    ----------
    kind : {"train", "memory", "flops", "time"}
    spec : str
        The attention; "" for times, which are measured for all specs in turn.
    data : str
        The data set; "" for costs.
    seed : int
        The seed of a training, or the number of a repetition.
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
        """The name of the cell in files and messages."""
        where = self.data or f"N={self.length} D={self.dim}"
        last = {"train": f"seed {self.seed}", "memory": f"repeat {self.seed}"}.get(self.kind, "")
        return " ".join(word for word in (self.kind, where, self.spec, last) if word)


def cells(grid: Grid, specs: Sequence[str], data: Sequence[str]) -> Iterator[Cell]:
    """Yield all cells, seed by seed, so that an early end leaves whole seeds.

    Parameters
    ----------
    grid : Grid
    specs : sequence of str
        The attentions, with the baseline.
    data : sequence of str
        The available data sets.
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
    """Return all that the figures depend on beside data and versions, as JSON."""
    from .cost import BATCH, CHANNELS
    from .training.model import Settings

    settings = {
        name: value
        for name, value in asdict(Settings()).items()
        if name not in ("spec", "seed", "epochs", "patience")
    }
    settings_of_run = asdict(grid) | {
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
        for name, value in settings_of_run.items()
    }
