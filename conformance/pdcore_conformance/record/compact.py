"""The compact form of a record: small enough to keep in a repository, a line for each case.

A record of 9,000 cases takes 5 MB, nearly all of it the error and budget of each output of cases
that passed, to 17 digits, and features that are the same in every run. The compact form keeps what
the page and the comparison of two records use: of a case that passed its error over budget, to two
digits, which is what the page shows; of a case that failed everything. Each case is one line with
the results of all runs beside one another, so that a change of one case changes one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from .types import KIND as RECORD_KIND
from .types import SCHEMA, Case, Level, Number, Outcome, Record, Run, RunHeader, Speed, Verdict

__all__ = ["KIND", "CompactRecord", "compacted", "expanded"]

KIND: Literal["pdcore-conformance-compact"] = "pdcore-conformance-compact"

#: The significant digits of the error over budget of a case that passed; the page shows as many.
RATIO_DIGITS = 2

#: The duration of a case where it was not kept.
_NOT_KEPT = Number("nan")

# Of these cases a reader wants to know everything.
_WHOLE: frozenset[Outcome] = frozenset({"failed", "known failure", "error"})


class Result(TypedDict):
    """How a case ended in one run, where a number or a word does not say everything."""

    outcome: Outcome
    ratio: NotRequired[Number]
    message: NotRequired[str]
    verdicts: NotRequired[dict[str, Verdict]]
    seconds: NotRequired[Number]


_Results = Annotated[
    list[float | Outcome | Result | None],
    Meta(
        description="By run, in the order of `runs`: the error over budget of a case that passed; "
        "the outcome alone where nothing was compared; null where the run has no such case."
    ),
]


class CompactRun(RunHeader):
    """A run without its cases."""

    speed: Speed | None


class CompactRecord(TypedDict):
    """A record in its compact form."""

    schema: Literal[1]
    kind: Literal["pdcore-conformance-compact"]
    runs: list[CompactRun]
    cases: Annotated[
        list[tuple[str, Level, list[str], _Results]],
        Meta(description="Id, level, features and results of each case, in the order of the ids."),
    ]


def compacted(runs: Sequence[Run]) -> CompactRecord:
    """Return the compact form of the runs of a record.

    Parameters
    ----------
    runs : sequence of Run
        With at most one for each backend and device.

    Returns
    -------
    CompactRecord
        `expanded` and `compacted` again return the same.
    """
    results: dict[tuple[str, Level, tuple[str, ...]], list[Any]] = {}
    for index, run in enumerate(runs):
        for case in run["cases"]:
            key = (case["id"], case["level"], tuple(case["features"]))
            results.setdefault(key, [None] * len(runs))[index] = _result(case)
    own_place = ("cases", "speed")
    headers: Any = [
        {name: value for name, value in run.items() if name not in own_place}
        | {"speed": run["speed"]}
        for run in runs
    ]
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "runs": headers,
        "cases": [(*key[:2], list(key[2]), results[key]) for key in sorted(results)],
    }


def _result(case: Case) -> float | Outcome | Result | None:
    outcome, ratio, message = case["outcome"], case["ratio"], case["message"]
    result: Result = {"outcome": outcome}
    if ratio is not None:
        result["ratio"] = ratio if outcome in _WHOLE else float(f"{ratio:.{RATIO_DIGITS}g}")
    if message is not None:
        result["message"] = message
    if outcome in _WHOLE:
        return {**result, "verdicts": case["verdicts"], "seconds": case["seconds"]}
    if message is None and ratio is None:
        return outcome
    if message is None and outcome == "passed" and abs(result["ratio"]) < float("inf"):
        return result["ratio"]
    return result


def expanded(compact: CompactRecord) -> Record:
    """Return the record that a compact form stands for.

    Parameters
    ----------
    compact : CompactRecord
        As `compacted` returns it.

    Returns
    -------
    Record
        Cases that passed have no verdicts, and NaN for their duration.
    """
    runs: list[Run] = []
    for index, header in enumerate(compact["runs"]):
        # A record lays out the keys of a run in this order.
        run: Any = {name: value for name, value in header.items() if name != "speed"}
        run.update(cases=list(_cases(compact, index)), speed=header["speed"])
        runs.append(run)
    return {"schema": SCHEMA, "kind": RECORD_KIND, "runs": runs}


def _cases(compact: CompactRecord, index: int) -> Iterator[Case]:
    for name, level, features, results in compact["cases"]:
        result = results[index]
        if result is None:
            continue
        if isinstance(result, float):
            result = {"outcome": "passed", "ratio": result}
        elif isinstance(result, str):
            result = {"outcome": result}
        yield {
            "id": name,
            "group": name.partition("::")[0],
            "level": level,
            "features": features,
            "outcome": result["outcome"],
            "ratio": result.get("ratio"),
            "verdicts": result.get("verdicts", {}),
            "message": result.get("message"),
            "seconds": result.get("seconds", _NOT_KEPT),
        }
