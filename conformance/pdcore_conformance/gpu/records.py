"""The record of a run on a GPU, made of its log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..record import writing as record
from ..runner.plugin import parse_backend

if TYPE_CHECKING:
    from ..record.writing import Run, Speed

__all__ = ["runs_of", "summary"]

#: The stages whose steps are measurements, not cases.
_MEASURED = ("machine", "rates", "speed", "variants")
#: The number of failures that are printed; the record has all of them.
SHOWN = 5


def runs_of(lines: Iterable[Mapping[str, Any]], header: Mapping[str, Any]) -> list[Run]:
    """Return a run for each target of a log, with the cases and the speed that are known so far."""
    done: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if "done" in line:
            done.setdefault(line["target"], []).append(line)
    return [_run(target, steps, header) for target, steps in done.items()]


def _run(target: str, steps: list[Mapping[str, Any]], header: Mapping[str, Any]) -> Run:
    run = record.new_run(*parse_backend(target))
    run["created"], run["level"] = header["created"], "core"
    for step in steps:
        if step["stage"] == "machine":
            run.update(step.get("found", {}))
            if step["done"]["outcome"] != "passed":
                run["available"], run["reason"] = False, step["done"]["message"]
    cases = {
        step["done"]["id"]: step["done"]
        for step in steps
        if step["stage"] not in _MEASURED
        or (step["stage"] != "machine" and step["done"]["outcome"] in ("failed", "error"))
    }
    run["cases"] = [cases[name] for name in sorted(cases)]
    run["selection"] = sorted(cases)
    run["counts"] = {o: sum(c["outcome"] == o for c in run["cases"]) for o in record.OUTCOMES}
    run["seconds"] = sum(case["seconds"] for case in run["cases"])
    measured = [s["found"]["speed"] for s in steps if "speed" in s.get("found", {})]
    run["speed"] = _merged(measured) if measured else None
    return run


def _merged(parts: list[Speed]) -> Speed:
    """Return the measurements of several steps as one."""
    whole: Any = dict(parts[0])
    for name, value in parts[0].items():
        if isinstance(value, list):
            items = [item for part in parts for item in part[name]]  # type: ignore[literal-required]
            # Each step lists the peers that are missing, and the notes.
            whole[name] = [x for i, x in enumerate(items) if x not in items[:i]]
    whole["seconds"] = sum(part["seconds"] for part in parts)
    whole["red"] = any(part["red"] for part in parts)
    return whole  # type: ignore[no-any-return]


def summary(run: Run) -> Iterator[str]:
    """Summarize a run in a few lines."""
    if not run["available"]:
        yield f"{record.target(run)}: not available: {run['reason']}"
        return
    gpu = run["environment"]["gpu"]
    versions = ", ".join(f"{name} {text}" for name, text in run["versions"].items())
    yield f"{record.target(run)} on {gpu['name'] if gpu else run['environment']['cpu']}: {versions}"
    counts = ", ".join(f"{count} {name}" for name, count in run["counts"].items() if count)
    ratios = [case["ratio"] for case in run["cases"] if case["ratio"] is not None]
    worst = f"; worst error {max(ratios):.3g} of its budget" if ratios else ""
    yield f"  {counts or 'no cases'}{worst}; {run['seconds']:.0f} s"
    failures = [case for case in run["cases"] if case["outcome"] in ("failed", "error")]
    for case in failures[:SHOWN]:
        text = " ".join((case["message"] or "").split())[:200]
        yield f"  {case['outcome']}: {case['id']}: {text}"
    if len(failures) > SHOWN:
        yield f"  and {len(failures) - SHOWN} more, in the record"
    for entry in run["speed"]["ratios"] if run["speed"] else ():
        shape = "x".join(map(str, entry["shape"]))
        yield (
            f"  {entry['spec']} {entry['dtype']} {entry['direction']} ({shape}): "
            f"{entry['ratio']:.2f} times as fast as {entry['peer']}"
        )
    for figure in run["speed"]["figures"] if run["speed"] else ():
        yield f"  {figure['name']}: {figure['value']:.3g} {figure['unit']}"
