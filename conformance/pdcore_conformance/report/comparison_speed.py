"""Comparison of two measurements of one backend on one machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..record.writing import Run, Speed
from .wording import interval, number, shape

__all__ = ["Difference", "compare_speed"]

#: A change of a time is reported when it is larger than this share, and the intervals are apart.
SLOWER = 0.05

#: A change of memory is reported when it is larger than this share, and than so many MiB.
HEAVIER, MIB = 0.10, 1.0

#: Above this load average before timing the figures may be wrong.
BUSY = 0.5


@dataclass(frozen=True)
class Difference:
    """A figure that changed."""

    way: Literal["worse", "better", "new", "gone"]
    kind: str
    what: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class _Figure:
    """A measured value, from any list of the record."""

    value: float
    ends: Sequence[float] | None
    higher_is_better: bool | None
    unit: str

    def __str__(self) -> str:
        bounds = "" if self.ends is None else f" ({interval(self.ends)})"
        return f"{number(self.value)}{self.unit}{bounds}"


def compare_speed(name: str, old: Run, new: Run) -> tuple[list[Difference], list[str]]:
    """Compare the figures of two runs.

    Parameters
    ----------
    name : str
        The name of the backend, for the notes.
    old, new : Run
        Both with speed.

    Returns
    -------
    differences : list of Difference
        None where the machines differ, or the numbers of a run are red.
    notes : list of str
        What was not compared, and what else differs.
    """
    was, now = old["speed"], new["speed"]
    if was is None or now is None or was["red"] or now["red"]:
        return [], []
    apart = _machines(old, new, was, now)
    if apart:
        return [], [f"{name}: speed and memory are not compared, the runs differ in {apart}"]
    differences: list[Difference] = []
    unjudged: list[str] = []
    times_before, times_after = _times(was), _times(now)
    for what in (name for name in times_before if name in times_after):
        before, after = times_before[what], times_after[what]
        if before.ends is None or after.ends is None:
            unjudged.append(what)
            continue
        difference = _judged(what, before, after)
        differences += [difference] if difference else []
    memory_before, memory_after = _memory(was), _memory(now)
    for what in (name for name in memory_before if name in memory_after):
        difference = _heavier(what, memory_before[what], memory_after[what])
        differences += [difference] if difference else []
    differences += [
        Difference("gone", "figure", what)
        for what in [*times_before, *memory_before]
        if what not in times_after and what not in memory_after
    ]
    differences += [
        Difference("new", "figure", what)
        for what in [*times_after, *memory_after]
        if what not in times_before and what not in memory_before
    ]
    order = list({**times_before, **memory_before, **times_after, **memory_after})
    differences.sort(key=lambda difference: order.index(difference.what))
    return differences, _notes(name, old, new, was, now, unjudged)


def _machines(old: Run, new: Run, was: Speed, now: Speed) -> str:
    """Return the differences of two machines that decide speed, as text; empty without any."""
    a, b = old["environment"], new["environment"]
    pairs = {
        "processor": (a["cpu"], b["cpu"]),
        "cores": (a["cores"], b["cores"]),
        "GPU": tuple(e["gpu"]["name"] if e["gpu"] else None for e in (a, b)),
        "threads": (was["threads"], now["threads"]),
    }
    return "; ".join(f"{what}: {x} / {y}" for what, (x, y) in pairs.items() if x != y)


def _times(speed: Speed) -> dict[str, _Figure]:
    figures = {}
    for r in speed["ratios"]:
        call = f"{r['spec']} {shape(r['shape'])} {r['dtype']}, {r['direction']}"
        figures[f"{call}, against {r['peer']}"] = _Figure(r["ratio"], r["interval"], True, "×")
    for g in speed["growth"]:
        what = f"{g['spec']} {g['dtype']}, {g['direction']}, growth from {g['from']} to {g['to']}"
        figures[what] = _Figure(g["factor"], g["interval"], False, "×")
    for f in speed["figures"]:
        # Only the target says whether higher or lower is better.
        one_sided = (f["at_least"] is None) != (f["at_most"] is None)
        higher = f["at_least"] is not None if one_sided else None
        figures[f["name"]] = _Figure(f["value"], f["interval"], higher, f" {f['unit']}")
    return figures


def _judged(what: str, before: _Figure, after: _Figure) -> Difference | None:
    if before.ends is None or after.ends is None or after.higher_is_better is None:
        return None
    rose = after.ends[0] > before.ends[1] and after.value > before.value * (1 + SLOWER)
    fell = after.ends[1] < before.ends[0] and after.value < before.value * (1 - SLOWER)
    if not rose and not fell:
        return None
    if rose == after.higher_is_better:
        return Difference("better", "faster", what, str(before), str(after))
    return Difference("worse", "slower", what, str(before), str(after))


def _memory(speed: Speed) -> dict[str, float]:
    return {
        f"{m['spec']} {shape(m['shape'])} {m['dtype']}, {m['direction']}, {m['way']}": m["mib"]
        for m in speed["memory"]
    }


def _heavier(what: str, before: float, after: float) -> Difference | None:
    texts = (f"{number(before)} MiB", f"{number(after)} MiB")
    if after > before * (1 + HEAVIER) and after > before + MIB:
        return Difference("worse", "more memory", what, *texts)
    if after < before * (1 - HEAVIER) and after < before - MIB:
        return Difference("better", "less memory", what, *texts)
    return None


def _notes(
    name: str, old: Run, new: Run, was: Speed, now: Speed, unjudged: Sequence[str]
) -> list[str]:
    notes = []
    versions = [
        f"{what} {x or 'none'} / {y or 'none'}"
        for what, x, y in _versions(old["versions"], new["versions"])
    ]
    if versions:
        notes.append(f"{name}: speed is compared over other versions: {', '.join(versions)}")
    for which, speed in (("first", was), ("second", now)):
        if speed["load"] is not None and speed["load"] > BUSY:
            notes.append(
                f"{name}: the machine of the {which} record was busy before timing "
                f"(load {number(speed['load'])})"
            )
    if unjudged:
        notes.append(
            f"{name}: {len(unjudged)} figures have no interval, and are not judged: "
            f"{'; '.join(unjudged[:3])}{' ...' if len(unjudged) > 3 else ''}"
        )
    return notes


def _versions(a: Mapping[str, str], b: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = [name for name in {**a, **b} if name != "pdcore"]
    return [(n, a.get(n, ""), b.get(n, "")) for n in names if a.get(n) != b.get(n)]
