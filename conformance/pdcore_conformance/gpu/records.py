"""Merge, extend and summarize the records of `pdcore_conformance.gpu`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..record.writing import Case, Run

__all__ = ["add_cases", "merge_runs", "summary", "unavailable_run"]

#: The number of failures that are printed; the record has all of them.
SHOWN = 5


def merge_runs(
    earlier: Run | None, parts: Sequence[Run], names: Sequence[str], *, selected: bool = False
) -> Run | None:
    """Merge runs, each of which has some of the cases, into one run.

    Parameters
    ----------
    earlier : Run or None
        An earlier run; a case that is also in `parts` is taken from there.
    parts : sequence of Run
        The runs of processes that ran at the same time.
    names : sequence of str
        The ids of the cases to keep; others are left out.
    selected : bool
        Whether `names` are fewer than the cases of the suite.

    Returns
    -------
    Run or None
        None where there is no case at all. The ``selection`` of the run is None only where the
        run has every case of the suite.
    """
    from ..record.writing import OUTCOMES

    runs = [run for run in (earlier, *parts) if run is not None]
    by_id = {case["id"]: case for run in runs for case in run["cases"]}
    cases = [by_id[name] for name in sorted(names) if name in by_id]
    if not cases:
        return None
    complete = len(cases) == len(names) and not selected
    seconds = max((run["seconds"] for run in parts), default=0.0)
    return {
        **runs[-1],
        "level": "all",
        "selection": None if complete else [case["id"] for case in cases],
        "cases": cases,
        "counts": {name: sum(c["outcome"] == name for c in cases) for name in OUTCOMES},
        "seconds": seconds + (earlier["seconds"] if earlier is not None else 0.0),
        "speed": None,
    }


def _command_for(run: Run, case: Case) -> str:
    """Return the command that runs a case again; a check of the device runs with the others."""
    from ..record.writing import run_alone, target
    from .checks import GROUP

    if case["group"] == GROUP:
        return f"python -m pdcore_conformance.gpu.checks {target(run)}"
    return run_alone(run, case)


def add_cases(run: Run, cases: Sequence[Case]) -> Run:
    """Return a run with cases added that are not in the suite."""
    from ..record.writing import OUTCOMES

    all_cases = [*run["cases"], *cases]
    seconds = run["seconds"] + sum(case["seconds"] for case in cases)
    counts = {name: sum(c["outcome"] == name for c in all_cases) for name in OUTCOMES}
    return {**run, "cases": all_cases, "counts": counts, "seconds": seconds}


def unavailable_run(target: str, reason: str) -> Run:
    """Return the run of a target that is not available."""
    from ..record import writing as record
    from ..record.environment import environment, versions

    name, _, device = target.partition(":")
    run = record.new_run(name, device)
    run["available"], run["reason"] = False, reason
    run["environment"], run["versions"] = environment(device), versions()
    return run


def summary(run: Run) -> Iterator[str]:
    """Summarize a run in a few lines."""
    from ..record.writing import target

    if not run["available"]:
        yield f"{target(run)}: not available: {run['reason']}"
        return
    gpu = run["environment"]["gpu"]
    versions = ", ".join(f"{name} {text}" for name, text in run["versions"].items())
    yield f"{target(run)} on {gpu['name'] if gpu else run['environment']['cpu']}: {versions}"
    counts = ", ".join(f"{count} {name}" for name, count in run["counts"].items() if count)
    ratios = [case["ratio"] for case in run["cases"] if case["ratio"] is not None]
    worst = f"; worst error {max(ratios):.3g} of its budget" if ratios else ""
    yield f"  {counts}{worst}; {run['seconds']:.0f} s"
    failures = [case for case in run["cases"] if case["outcome"] in ("failed", "error")]
    for case in failures[:SHOWN]:
        text = " ".join((case["message"] or "").split())[:200]
        yield f"  {case['outcome']}: {case['id']}: {text}"
        yield f"    alone: {_command_for(run, case)}"
    if len(failures) > SHOWN:
        yield f"  and {len(failures) - SHOWN} more, in the record"
    speed = run["speed"]
    if speed is None:
        return
    if speed["red"]:
        yield "  speed: the numerics at the timed shapes are red, so nothing was timed"
    for entry in speed["ratios"]:
        shape = "x".join(map(str, entry["shape"]))
        yield (
            f"  {entry['spec']} {entry['dtype']} {entry['direction']} ({shape}): "
            f"{entry['ratio']:.2f} times as fast as {entry['peer']}"
        )
    for figure in speed["figures"]:
        yield f"  {figure['name']}: {figure['value']:.3g} {figure['unit']}"
    absent: dict[str, list[str]] = {}
    for peer in speed["missing_peers"]:
        absent.setdefault(peer["reason"], []).append(peer["peer"])
    for reason, peers in absent.items():
        yield f"  not compared with {'; '.join(peers)}: {reason}"
