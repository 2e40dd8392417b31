"""Comparison of two records: what got worse, what got better, what is new and what is gone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pdcore.errors import Exit

from ..record.writing import Case, Outcome, Record, RecordError, Run, target
from .comparison_speed import compare_speed
from .view import BAD
from .wording import over_budget

__all__ = ["Change", "Comparison", "as_dict", "compare"]

#: A change of an error is reported when the error grew by more than the first factor, to more than
#: the second number of budgets.
GROWN, NEAR = 2.0, 0.5

# Outcomes of equal rank are neither better nor worse than one another.
_RANK: Mapping[Outcome, int] = {
    "passed": 3,
    "refusal verified": 2,
    "not claimed": 2,
    "known failure": 1,
    "failed": 0,
    "error": 0,
}
_NOW: Mapping[Outcome, str] = {
    "passed": "passes now",
    "refusal verified": "refused now",
    "not claimed": "not claimed now",
    "known failure": "known failure now",
    "failed": "fails now",
    "error": "breaks now",
}

Way = Literal["worse", "better", "other", "new", "gone"]


@dataclass(frozen=True)
class Change:
    """One difference between two records.

    Attributes
    ----------
    way : {"worse", "better", "other", "new", "gone"}
        What it means.
    where : str
        The backend and device.
    kind : str
        What happened, in a few words.
    what : str
        To what: the id of a case, a feature, a measured call.
    before, after : str
        How it was, and how it is.
    numerics : bool
        Whether it is about what is computed; else it is about speed or memory.
    """

    way: Way
    where: str
    kind: str
    what: str
    before: str = ""
    after: str = ""
    numerics: bool = True


@dataclass
class Comparison:
    """What differs between two records, and what could not be compared.

    Attributes
    ----------
    changes : list of Change
        By backend, in the order of the records.
    notes : list of str
        What was not compared and why, and what else a reader should know.
    compared : int
        How many cases were in both.
    """

    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: int = 0

    def of(self, way: Way) -> list[Change]:
        """Return the changes of one kind, numerics first."""
        return sorted((c for c in self.changes if c.way == way), key=lambda c: not c.numerics)

    @property
    def exit_code(self) -> Exit:
        """DONE, NUMERICS where something computed got worse, UNMET where only speed or memory."""
        worse = self.of("worse")
        if not worse:
            return Exit.DONE
        return Exit.NUMERICS if worse[0].numerics else Exit.UNMET


def compare(before: Record, after: Record) -> Comparison:
    """Compare two records, run by run.

    Parameters
    ----------
    before, after : Record
        As `pdcore_conformance.record.load` returns them.

    Returns
    -------
    Comparison

    Raises
    ------
    RecordError
        When they have no backend and device in common.

    Notes
    -----
    Worse is: a case that newly fails, is missing, or is refused; an error over budget that is more
    than twice as large and above 0.5; a capability that is withdrawn; a backend that is not
    available any more; a speed whose 95 % interval lies apart from the earlier one, on the wrong
    side and by more than 5 %; peak memory that has grown by more than 10 % and 1 MiB. Better is
    the reverse. Speed and memory are compared only where both runs had the same machine.
    """
    old = {target(run): run for run in before["runs"]}
    new = {target(run): run for run in after["runs"]}
    common = [name for name in old if name in new]
    if not common:
        raise RecordError(
            f"nothing to compare: the first record has {_listed(old)}, the second {_listed(new)}"
        )
    comparison = Comparison()
    for name in common:
        _compare_runs(comparison, name, old[name], new[name])
    comparison.changes += [Change("gone", n, "run", n) for n in old if n not in new]
    comparison.changes += [Change("new", n, "run", n) for n in new if n not in old]
    return comparison


def _listed(runs: Mapping[str, Run]) -> str:
    return ", ".join(list(runs)[:10]) or "no run"


def _compare_runs(comparison: Comparison, name: str, old: Run, new: Run) -> None:
    if not new["available"]:
        if old["available"]:
            reason = new["reason"] or "no reason given"
            comparison.changes.append(
                Change("worse", name, "not available any more", name, "", reason)
            )
        return
    if not old["available"]:
        comparison.changes.append(
            Change("better", name, "available now", name, old["reason"] or "")
        )
        return
    comparison.changes += _capabilities(name, old, new)
    _compare_cases(comparison, name, old, new)
    if old["speed"] is None or new["speed"] is None:
        if (old["speed"] is None) != (new["speed"] is None):
            which = "second" if old["speed"] is None else "first"
            comparison.notes.append(
                f"{name}: only the {which} record has speed, so none is compared"
            )
        return
    if new["speed"]["red"] != old["speed"]["red"]:
        worse = new["speed"]["red"]
        states = ("green", "red") if worse else ("red", "green")
        kind = "over budget at full size" if worse else "within budget at full size now"
        way: Way = "worse" if worse else "better"
        comparison.changes.append(Change(way, name, kind, "numbers before timing", *states))
    differences, notes = compare_speed(name, old, new)
    comparison.notes += notes
    comparison.changes += [
        Change(d.way, name, d.kind, d.what, d.before, d.after, numerics=False) for d in differences
    ]


def _capabilities(name: str, old: Run, new: Run) -> Iterator[Change]:
    words = {"full": "full", "unsupported": "unsupported", "not_implemented": "not implemented"}
    for feature in {**old["capabilities"], **new["capabilities"]}:
        was, now = old["capabilities"].get(feature), new["capabilities"].get(feature)
        if was == now:
            continue
        texts = [words.get(support or "", "not stated") for support in (was, now)]
        if was == "full":
            yield Change("worse", name, "capability withdrawn", feature, texts[0], texts[1])
        elif now == "full" and was is not None:
            yield Change("better", name, "capability gained", feature, texts[0], texts[1])
        else:
            way: Way = "new" if was is None else "gone" if now is None else "other"
            yield Change(way, name, "capability", feature, texts[0], texts[1])


def _compare_cases(comparison: Comparison, name: str, old: Run, new: Run) -> None:
    was = {case["id"]: case for case in old["cases"]}
    now = {case["id"]: case for case in new["cases"]}
    common = [case for case in was if case in now]
    comparison.compared += len(common)
    for case in common:
        change = _case(name, was[case], now[case])
        if change is not None:
            comparison.changes.append(change)
    narrower = _narrower(old, new)
    missing = [case for case in was if case not in now]
    if missing and narrower:
        comparison.notes.append(
            f"{name}: {len(missing):,} cases are only in the first record, because {narrower}"
        )
    elif missing:
        comparison.changes += [
            Change("worse", name, "case missing", case, was[case]["outcome"]) for case in missing
        ]
    for case in now:
        if case not in was:
            outcome = now[case]["outcome"]
            way: Way = "worse" if outcome in BAD else "new"
            kind = "new and fails" if outcome in BAD else "case"
            comparison.changes.append(Change(way, name, kind, case, "", outcome))


def _narrower(old: Run, new: Run) -> str:
    """Return why cases of the old run were not asked for in the new one; empty if they were."""
    if new["selection"] is not None:
        return "only some cases were selected in the second"
    if (old["grid"], new["grid"]) == ("full", "quick"):
        return "the second has the quick grid"
    if (old["level"], new["level"]) == ("all", "core"):
        return "the second has the core level alone"
    if not new["cases"] and new["speed"] is not None:
        return "the second has nothing but measurements"
    return ""


def _case(name: str, old: Case, new: Case) -> Change | None:
    was, now = old["outcome"], new["outcome"]
    if was != now:
        texts = (_ended(old), _ended(new))
        difference = _RANK[now] - _RANK[was]
        way: Way = "worse" if difference < 0 else "better" if difference > 0 else "other"
        return Change(way, name, _NOW[now], new["id"], *texts)
    if old["ratio"] is None or new["ratio"] is None:
        return None
    before, after = _comparable(old["ratio"]), _comparable(new["ratio"])
    texts = (over_budget(old["ratio"]), over_budget(new["ratio"]))
    if after > GROWN * before and after > NEAR:
        return Change("worse", name, "error / budget grew", new["id"], *texts)
    if before > GROWN * after and before > NEAR:
        return Change("better", name, "error / budget shrank", new["id"], *texts)
    return None


def _ended(case: Case) -> str:
    ratio = over_budget(case["ratio"])
    return f"{case['outcome']}, {ratio}" if ratio else case["outcome"]


def _comparable(ratio: float) -> float:
    return math.inf if math.isnan(ratio) else ratio


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain objects, for JSON."""
    ways: Sequence[Way] = ("worse", "better", "other", "new", "gone")
    return {
        **{
            way: [
                {
                    "backend": c.where,
                    "kind": c.kind,
                    "what": c.what,
                    "before": c.before,
                    "after": c.after,
                    "about": "numerics" if c.numerics else "speed",
                }
                for c in comparison.of(way)
            ]
            for way in ways
        },
        "notes": comparison.notes,
        "cases_compared": comparison.compared,
        "exit_code": int(comparison.exit_code),
    }
