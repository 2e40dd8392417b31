"""What a record holds, as types.

``record.schema.json`` says the same to other programs, and what each entry means. A float may be
infinite or NaN here; in the file it is then one of the strings ``"inf"``, ``"-inf"``, ``"nan"``.
"""

from __future__ import annotations

from typing import Literal, TypedDict, get_args

__all__ = [
    "KIND",
    "OUTCOMES",
    "SCHEMA",
    "Case",
    "Environment",
    "Figure",
    "Gpu",
    "Growth",
    "Memory",
    "MissingPeer",
    "Numerics",
    "Outcome",
    "Ratio",
    "Record",
    "Run",
    "Speed",
    "Verdict",
]

#: The version of the format. A reader refuses a newer one.
SCHEMA = 1
KIND: Literal["pdcore-conformance"] = "pdcore-conformance"

Outcome = Literal["passed", "failed", "refusal verified", "not claimed", "known failure", "error"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

Direction = Literal["forward", "forward+backward"]


class Gpu(TypedDict):
    """The accelerator of a run."""

    name: str
    memory_gib: float
    driver: str | None
    capability: str | None


class Environment(TypedDict):
    """The machine of a run."""

    cpu: str
    cores: int
    threads: int | None
    blas: str | None
    load: float | None
    memory_gib: float | None
    platform: str
    gpu: Gpu | None


class Verdict(TypedDict):
    """How far one output of a case was from the oracle."""

    ratio: float
    error: float
    budget: float


class Case(TypedDict):
    """One case of the suite, and how it ended."""

    id: str
    group: str
    level: Literal["core", "optional"]
    features: list[str]
    outcome: Outcome
    ratio: float | None
    verdicts: dict[str, Verdict]
    message: str | None
    seconds: float


class Numerics(TypedDict):
    """The check of one call's numbers, before anything is timed."""

    spec: str
    shape: list[int]
    dtype: str
    by: str
    error_over_budget: dict[str, float]
    ok: bool


class Ratio(TypedDict):
    """A peer's time over the backend's: times as fast."""

    spec: str
    shape: list[int]
    dtype: str
    direction: Direction
    peer: str
    ratio: float
    interval: list[float] | None
    rounds: int
    seconds: dict[str, list[float]]
    at_least: float | None
    at_most: float | None
    met: bool | None


# "from" is a word of Python, so that a class body cannot declare this key.
_Span = TypedDict("_Span", {"from": int, "to": int})


class Growth(_Span):
    """How the time grows with the length of the sequence."""

    spec: str
    dtype: str
    direction: Direction
    lengths: list[int]
    seconds: list[list[float]]
    factor: float
    interval: list[float] | None
    at_least: float | None
    at_most: float | None
    met: bool | None


class Memory(TypedDict):
    """The peak memory of a call beside its inputs and results."""

    spec: str
    shape: list[int]
    dtype: str
    direction: Direction
    way: Literal["tracemalloc", "resident", "device"]
    mib: float
    at_most: float | None
    met: bool | None


class Figure(TypedDict):
    """Any other figure, such as the overhead of a call."""

    name: str
    value: float
    unit: str
    interval: list[float] | None
    at_least: float | None
    at_most: float | None
    met: bool | None


class MissingPeer(TypedDict):
    """A peer that could not be measured against."""

    peer: str
    reason: str


class Speed(TypedDict):
    """What was measured after the numerics were found green."""

    grid: Literal["quick", "full"]
    threads: int | None
    notes: list[str]
    seconds: float
    load: float | None
    numerics: list[Numerics]
    red: bool
    ratios: list[Ratio]
    growth: list[Growth]
    memory: list[Memory]
    figures: list[Figure]
    missing_peers: list[MissingPeer]


class Run(TypedDict):
    """One backend on one device."""

    backend: str
    device: str
    created: str
    commit: str | None
    dirty: bool | None
    level: Literal["core", "all"]
    grid: Literal["quick", "full"]
    selection: list[str] | None
    available: bool
    reason: str | None
    versions: dict[str, str]
    environment: Environment
    precision: str
    capabilities: dict[str, Literal["full", "unsupported", "not_implemented"]]
    counts: dict[Outcome, int]
    seconds: float
    cases: list[Case]
    speed: Speed | None


class Record(TypedDict):
    """The whole file."""

    schema: int
    kind: Literal["pdcore-conformance"]
    runs: list[Run]
