"""The declaration of a record: its types, what each entry means, and the bounds of its values.

The types are the only description of the format. `pdcore_conformance.record.reading` checks files
against them by msgspec, and `pdcore report --schema` prints the JSON Schema that follows from them.
A `Number` may be infinite or NaN; JSON has no such numbers, so a file then holds one of the
strings ``"inf"``, ``"-inf"`` and ``"nan"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, NotRequired, TypedDict, get_args

from msgspec import Meta

__all__ = [
    "KIND",
    "OUTCOMES",
    "SCHEMA",
    "Case",
    "Coverage",
    "Environment",
    "Figure",
    "Gpu",
    "Growth",
    "Level",
    "Memory",
    "MissingPeer",
    "Number",
    "Numerics",
    "Outcome",
    "ProcessEnd",
    "Ratio",
    "Record",
    "Run",
    "RunHeader",
    "Speed",
    "Verdict",
]

#: The version of the format. A reader refuses a newer one.
SCHEMA: Literal[1] = 1
KIND: Literal["pdcore-conformance"] = "pdcore-conformance"

Outcome = Literal["passed", "failed", "refusal verified", "not claimed", "known failure", "error"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

Level = Literal["core", "optional"]

if TYPE_CHECKING:
    Number = float
else:

    class Number(float):
        """A float that msgspec leaves to this package's hook, which also reads "inf" and "nan"."""


_Natural = Annotated[int, Meta(ge=0)]
_Positive = Annotated[int, Meta(ge=1)]
_Name = Annotated[str, Meta(min_length=1)]
_Shape = Annotated[list[_Natural], Meta(description="The sizes of all axes of q, k and v.")]
_Spec = Annotated[str, Meta(description="The specification, in canonical form.")]
_Dtype = Annotated[str, Meta(description="Of q, k and v.")]
_Direction = Annotated[
    Literal["forward", "forward+backward"], Meta(description="What was measured.")
]
_Quartiles = Annotated[
    list[Number],
    Meta(
        min_length=3,
        max_length=3,
        description="First quartile, median and third quartile, in seconds.",
    ),
]
_Ends = Annotated[list[Number], Meta(min_length=2, max_length=2)]
_Interval = Annotated[
    _Ends | None,
    Meta(description="The 95 % bootstrap interval; null where it could not be computed."),
]
_AtLeast = Annotated[Number | None, Meta(description="The target's lower end, or null.")]
_AtMost = Annotated[Number | None, Meta(description="The target's upper end, or null.")]
_Met = Annotated[
    bool | None, Meta(description="Whether the target is met; null where it is not judged.")
]


class Gpu(TypedDict):
    """The accelerator of a run."""

    name: Annotated[str, Meta(description="As its driver reports it.")]
    memory_gib: Annotated[Number, Meta(description="Of the device.")]
    driver: Annotated[str | None, Meta(description="The driver's version.")]
    capability: Annotated[str | None, Meta(description="The compute capability, such as 9.0.")]


class Environment(TypedDict):
    """The machine of a run."""

    cpu: Annotated[str, Meta(description="The processor's name.")]
    cores: Annotated[_Positive, Meta(description="Logical processors.")]
    threads: Annotated[
        _Positive | None,
        Meta(description="To which the libraries were limited; null where they were not."),
    ]
    blas: Annotated[
        str | None, Meta(description="NumPy's BLAS and its version; null where it is unknown.")
    ]
    load: Annotated[
        Number | None,
        Meta(
            description="The load average over a minute, before the run; null where the system "
            "has none."
        ),
    ]
    memory_gib: Annotated[
        Number | None, Meta(description="Of the machine; null where it is unknown.")
    ]
    platform: Annotated[str, Meta(description="The operating system and architecture.")]
    gpu: Annotated[Gpu | None, Meta(description="Null where the run used none.")]


class Verdict(TypedDict):
    """How far one output of a case was from the oracle, at its worst head."""

    ratio: Annotated[Number, Meta(description="Error over budget.")]
    error: Annotated[
        Number, Meta(description="The largest absolute difference from the float64 oracle.")
    ]
    budget: Annotated[Number, Meta(description="The error that rounding explains there.")]


_Verdicts = Annotated[
    dict[str, Verdict], Meta(description="By output: out, lse, d_q and so on; may be left out.")
]
_Message = Annotated[
    str | None, Meta(description="Why the case did not pass, or what it measured.")
]


class Case(TypedDict):
    """One case of the suite. `pdcore conform BACKEND:DEVICE --case ID` runs it alone."""

    id: Annotated[
        _Name,
        Meta(
            description="Such as statistics::variance_is_biased[bn-float32]. It stays the same "
            "from version to version."
        ),
    ]
    group: Annotated[_Name, Meta(description="The part of the id before the two colons.")]
    level: Annotated[Level, Meta(description="Core: every backend has to pass it.")]
    features: Annotated[list[str], Meta(description="What the case asks of a backend.")]
    outcome: Annotated[
        Outcome,
        Meta(
            description="Refusal verified: the backend declares that it does not support the "
            "case, was called, and refused with a reason. Not claimed: a property that the "
            "backend does not declare, such as determinism. Known failure: listed by the "
            "backend's plugin, with a reason, and it does fail. Error: the case itself broke."
        ),
    ]
    ratio: Annotated[
        Number | None,
        Meta(
            description="The largest error over budget of its outputs; more than 1 fails. Null "
            "where nothing was compared."
        ),
    ]
    verdicts: _Verdicts
    message: _Message
    seconds: Annotated[
        Number, Meta(description="How long the case took; nan where that was not kept.")
    ]


class Numerics(TypedDict):
    """The check of one call's numbers, before anything is timed."""

    spec: _Spec
    shape: _Shape
    dtype: _Dtype
    by: Annotated[str, Meta(description="Who computed it: the backend or a peer.")]
    error_over_budget: Annotated[dict[str, Number], Meta(description="By output.")]
    ok: Annotated[bool, Meta(description="Whether all are at most 1.")]


class Ratio(TypedDict):
    """A peer's time over the backend's: times as fast."""

    spec: _Spec
    shape: _Shape
    dtype: _Dtype
    direction: _Direction
    peer: Annotated[str, Meta(description="Whose time is above the line.")]
    ratio: Annotated[Number, Meta(description="The median over the rounds.")]
    interval: _Interval
    rounds: Annotated[_Natural, Meta(description="How often both were timed next to one another.")]
    seconds: Annotated[dict[str, _Quartiles], Meta(description="By backend and peer.")]
    at_least: _AtLeast
    at_most: _AtMost
    met: _Met


# "from" is a keyword of Python, so that a class body cannot declare this key.
_Span = TypedDict(
    "_Span",
    {
        "from": Annotated[_Positive, Meta(description="A length.")],
        "to": Annotated[_Positive, Meta(description="Another, for the factor.")],
    },
)


class Growth(_Span):
    """How the time grows with the length of the sequence."""

    spec: _Spec
    dtype: _Dtype
    direction: _Direction
    lengths: Annotated[list[_Positive], Meta(description="In tokens, ascending.")]
    seconds: Annotated[list[_Quartiles], Meta(description="One entry for each length.")]
    factor: Annotated[Number, Meta(description="The time at `to` over the time at `from`.")]
    interval: _Interval
    at_least: _AtLeast
    at_most: _AtMost
    met: _Met


class Memory(TypedDict):
    """The peak memory of a call beside its inputs and results."""

    spec: _Spec
    shape: _Shape
    dtype: _Dtype
    direction: _Direction
    way: Annotated[
        Literal["tracemalloc", "resident", "device"],
        Meta(
            description="What was watched: Python's allocator, the process, or the accelerator's "
            "allocator."
        ),
    ]
    mib: Annotated[Number, Meta(description="The peak, in MiB.")]
    at_most: _AtMost
    met: _Met


class Figure(TypedDict):
    """Any other figure, such as the overhead of a call."""

    name: Annotated[str, Meta(description="What it is.")]
    value: Annotated[Number, Meta(description="The median.")]
    unit: Annotated[str, Meta(description="Of the value and its targets.")]
    interval: _Interval
    at_least: _AtLeast
    at_most: _AtMost
    met: _Met


class MissingPeer(TypedDict):
    """A peer that could not be measured against."""

    peer: Annotated[str, Meta(description="Its name.")]
    reason: Annotated[str, Meta(description="Why, and what would help.")]


class Speed(TypedDict):
    """What was measured once the numerics were green."""

    grid: Annotated[Literal["quick", "full"], Meta(description="How many shapes and rounds.")]
    threads: Annotated[
        _Positive | None,
        Meta(
            description="To which the libraries were limited while timing; null where they were "
            "not."
        ),
    ]
    notes: Annotated[list[str], Meta(description="What to know about the figures.")]
    seconds: Annotated[Number, Meta(description="How long it took.")]
    load: Annotated[
        Number | None,
        Meta(description="The load average over a minute, before the first measurement."),
    ]
    numerics: Annotated[
        list[Numerics],
        Meta(description="Every call that was to be timed, compared with the oracle."),
    ]
    red: Annotated[
        bool,
        Meta(description="Whether one of them was over its budget; then nothing was timed."),
    ]
    ratios: Annotated[
        list[Ratio],
        Meta(description="Against peers, and between specifications of the one backend."),
    ]
    growth: Annotated[list[Growth], Meta(description="Curves of time over length.")]
    memory: Annotated[list[Memory], Meta(description="Each in a process of its own.")]
    figures: Annotated[
        list[Figure],
        Meta(description="Such as the overhead of a call and the time of an import."),
    ]
    missing_peers: Annotated[
        list[MissingPeer], Meta(description="So that none is missing in silence.")
    ]


class ProcessEnd(TypedDict):
    """How the process of a run ended before its time."""

    how: Annotated[str, Meta(description="Its signal, its exit code, or the limit of a case.")]
    case: Annotated[
        str | None, Meta(description="The id of the case that ran; null where none did.")
    ]
    log: Annotated[str, Meta(description="What that case printed, shortened.")]


class Coverage(TypedDict):
    """How many combinations of the axes' values passed, of those that the backend declares."""

    pairs: Annotated[list[_Natural], Meta(min_length=2, max_length=2, description="Passed, of.")]
    triples: Annotated[
        list[_Natural],
        Meta(
            min_length=2,
            max_length=2,
            description="Passed, of; of values of axes that meet in one kernel.",
        ),
    ]


class RunHeader(TypedDict):
    """One backend on one device, in one process: everything but its cases and its speed."""

    backend: Annotated[_Name, Meta(description="Its name.")]
    device: Annotated[_Name, Meta(description="Such as cpu or cuda.")]
    created: Annotated[
        str,
        Meta(
            pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?Z$",
            description="When the run began, in UTC.",
        ),
    ]
    commit: Annotated[
        Annotated[str, Meta(pattern="^[0-9a-f]{7,64}$")] | None,
        Meta(
            description="Of the checkout that pdcore was imported from; null where it was "
            "installed."
        ),
    ]
    dirty: Annotated[
        bool | None,
        Meta(
            description="Whether tracked files outside of docs/ differed from the commit; null "
            "without a commit."
        ),
    ]
    level: Annotated[
        Literal["core", "all"],
        Meta(
            description="Which cases were asked for: only those that every backend has to pass, "
            "or all."
        ),
    ]
    grid: Annotated[Literal["quick", "full"], Meta(description="How many sizes and combinations.")]
    selection: Annotated[
        list[str] | None,
        Meta(description="The ids of the cases, where only some were asked for; else null."),
    ]
    available: Annotated[bool, Meta(description="Whether the backend could run there at all.")]
    reason: Annotated[str | None, Meta(description="Why it could not; null where it could.")]
    versions: Annotated[
        dict[str, str],
        Meta(
            description="Of pdcore, Python, NumPy, the framework and what else decides the "
            "numbers, by name."
        ),
    ]
    environment: Environment
    precision: Annotated[str, Meta(description="The precision policy, in one line.")]
    capabilities: Annotated[
        dict[str, Literal["full", "unsupported", "not_implemented"]],
        Meta(description="What the backend declares, by feature."),
    ]
    counts: Annotated[
        dict[Outcome, _Natural],
        Meta(
            min_length=len(OUTCOMES),
            description="How many cases ended how, with every outcome; the sums of the cases.",
        ),
    ]
    seconds: Annotated[Number, Meta(description="How long the suite took.")]
    coverage: NotRequired[
        Annotated[Coverage, Meta(description="Only where calls that combine all axes ran.")]
    ]
    ended: NotRequired[
        Annotated[
            ProcessEnd,
            Meta(description="Only where the process of the run ended before all cases had run."),
        ]
    ]


class Run(RunHeader):
    """One backend on one device, in one process."""

    cases: Annotated[list[Case], Meta(description="In the order of their ids, each id once.")]
    speed: Annotated[Speed | None, Meta(description="Null where nothing was timed.")]


class Record(TypedDict):
    """What backends compute and how fast, as measured by pdcore_conformance."""

    schema: Annotated[
        Literal[1],
        Meta(description="The version of this format. A reader refuses one it does not know."),
    ]
    kind: Annotated[
        Literal["pdcore-conformance"], Meta(description="Tells a record from other JSON files.")
    ]
    runs: Annotated[list[Run], Meta(description="At most one for each backend and device.")]
