"""The measurements: grids, and their cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pdcore.spec import parse

__all__ = [
    "BASELINE",
    "BETAS",
    "GRIDS",
    "MEASURES",
    "Cell",
    "Grid",
    "canonical",
    "cells",
    "of_same_cost",
    "protocol",
    "tuned",
    "tunings",
    "with_beta",
]

#: The attention that all others are compared with.
BASELINE = "softmax"

#: What the paper's sentence is about: Attention-BN as written, without division, and heads.
CLAIMED = (
    "softmax+bn",
    "softmax+bn(with_std=false)",
    "softmax+sh(half=2)",
    "softmax+bn+sh(half=2)",
)

#: All attentions. Where a spec says "tuned", beta is chosen for each data set, see `tunings`.
ALL = (
    "softmax+bn",
    "softmax+bn(with_std=false)",
    "softmax+bn(beta=tuned,with_std=false)",
    "softmax+bn(beta=param,with_std=false)",
    "softmax+sh(half=2)",
    "softmax+bn+sh(half=2)",
    "softmax+bn(with_std=false)+sh(half=2)",
    "softmax+bn(beta=tuned,with_std=false)+sh(half=2)",
    "softmax+bn(beta=param,with_std=false)+sh(half=2)",
    "linear",
    "linear+bn(beta=tuned,with_std=false)",
    "softmax+sparse(8,8)",
    "softmax+bn(beta=tuned,with_std=false)+sparse(8,8)",
    "softmax+conv1d",
    "softmax+iebn",
    "softmax+mixture",
)

#: The values that "tuned" stands for.
BETAS = (0.25, 0.5, 0.75, 1.0)
_TUNED = "beta=tuned"

#: Mean L2 distance of two heads' maps (N, M), of their outputs (N, Dv), and of their outputs over
#: the mean norm of them.
MEASURES = ("maps", "outputs", "relative")


@dataclass(frozen=True)
class Grid:
    """A protocol, apart from the specs.

    Attributes
    ----------
    name : str
    specs : tuple of str
        The attentions beside the baseline, where the user names none.
    seeds : tuple of int
        Seeds of the split, the first weights and all random numbers of the training.
    epochs, patience : int
        As in `pdcore_adapters.time_series.model.Settings`.
    steps : int
        The most steps of a fit, which allow fewer epochs of large data sets.
    rate, noise : float
        As in `pdcore_adapters.time_series.model.Settings`.
    tokens : int
        The most tokens of a time series: it is cut into patches of as few steps as allow it.
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
    specs: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    patience: int
    steps: int
    rate: float
    noise: float
    tokens: int
    sizes: tuple[tuple[int, int], ...]
    rounds: int
    repeats: int
    shown: int


GRIDS = {
    "quick": Grid(
        name="quick",
        specs=CLAIMED,
        seeds=(0, 1),
        epochs=30,
        patience=8,
        steps=600,
        rate=2e-3,
        noise=0.1,
        tokens=32,
        sizes=((128, 16), (512, 16), (2048, 16), (512, 64), (512, 128)),
        rounds=7,
        repeats=3,
        shown=60,
    ),
    "full": Grid(
        name="full",
        specs=ALL,
        seeds=(0, 1, 2, 3, 4),
        epochs=100,
        patience=25,
        steps=3000,
        rate=2e-3,
        noise=0.1,
        tokens=64,
        sizes=(
            (128, 16),
            (512, 16),
            (2048, 16),
            (512, 64),
            (2048, 64),
        ),
        rounds=15,
        repeats=3,
        shown=60,
    ),
}


class Cell(NamedTuple):
    """One measurement, which is computed, kept and skipped as a whole.

    Attributes
    ----------
    kind : {"tune", "train", "memory", "flops", "time"}
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
        seed, repeat = f"seed {self.seed}", f"repeat {self.seed}"
        last = {"tune": seed, "train": seed, "memory": repeat}.get(self.kind, "")
        return " ".join(word for word in (self.kind, where, self.spec, last) if word)


def canonical(text: str) -> str:
    """Return the canonical form of a spec, which may say "tuned" for beta.

    Raises
    ------
    SpecError
        When the text is no spec.
    """
    stand_in = 0.123456789
    return str(parse(with_beta(text, stand_in))).replace(f"beta={stand_in:g}", _TUNED)


def with_beta(spec: str, beta: float) -> str:
    """Return a spec with a number in place of "tuned"; another as it is."""
    return spec.replace(_TUNED, f"beta={beta:g}")


def of_same_cost(spec: str) -> str:
    """Return the spec whose cost is measured for a spec: that of any beta is that of beta 1."""
    return str(parse(with_beta(spec, 1.0)))


def tunings(grid: Grid, specs: Sequence[str], data: Sequence[str]) -> Iterator[Cell]:
    """Yield the fits that choose beta, on one seed, by validation loss."""
    for name in data:
        for spec in specs:
            if _TUNED in spec:
                for beta in BETAS:
                    yield Cell("tune", with_beta(spec, beta), name, grid.seeds[0])


def tuned(cells: Mapping[str, Any], grid: Grid, spec: str, data: str) -> float | None:
    """Return the beta of a spec on a data set; None where the spec leaves nothing to tune."""
    if _TUNED not in spec:
        return None
    seed = grid.seeds[0]
    losses = {b: cells[Cell("tune", with_beta(spec, b), data, seed).name]["loss"] for b in BETAS}
    return min(losses, key=losses.__getitem__)


def cells(grid: Grid, specs: Sequence[str], data: Sequence[str]) -> Iterator[Cell]:
    """Yield all cells but `tunings`, seed by seed, so that an early end leaves whole seeds.

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
    priced = list(dict.fromkeys(map(of_same_cost, specs)))
    for repeat in range(grid.repeats):
        for length, dim in grid.sizes:
            for spec in priced:
                yield Cell("memory", spec, seed=repeat, length=length, dim=dim)
    for length, dim in grid.sizes:
        for spec in priced:
            yield Cell("flops", spec, length=length, dim=dim)
        yield Cell("time", length=length, dim=dim)


def protocol(grid: Grid, specs: Sequence[str]) -> dict[str, Any]:
    """Return all that the figures depend on beside data and versions, as JSON."""
    from pdcore_adapters.time_series.model import Settings

    from .cost import BATCH, CHANNELS

    settings = {
        name: value
        for name, value in asdict(Settings()).items()
        if name not in ("spec", "seed", "epochs", "patience", "rate", "noise")
    }
    settings_of_run = asdict(grid) | {
        "betas": BETAS,
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
