"""The records of `pdcore_conformance.gpu`: parts put together, and said in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..record.writing import Case, Run

__all__ = ["absent", "joined", "summary", "with_cases"]

#: Failures and ratios that are printed; the record has all of them.
SHOWN = 5


def joined(
    earlier: Run | None, parts: Sequence[Run], wanted: Sequence[str], *, selected: bool = False
) -> Run | None:
    """Make one run of those that had a part of the cases each.

    Parameters
    ----------
    earlier : Run or None
        What was known before; its cases give way to those of `parts`.
    parts : sequence of Run
        Of processes that ran side by side.
    wanted : sequence of str
        The ids that there are to be; others are left out.
    selected : bool
        Whether these are fewer than the suite has.

    Returns
    -------
    Run or None
        None where there is no case at all. Its ``selection`` is None only where every case of
        the suite is there.
    """
    from ..record.writing import OUTCOMES

    runs = [run for run in (earlier, *parts) if run is not None]
    found = {case["id"]: case for run in runs for case in run["cases"]}
    cases = [found[name] for name in sorted(wanted) if name in found]
    if not cases:
        return None
    whole = len(cases) == len(wanted) and not selected
    seconds = max((run["seconds"] for run in parts), default=0.0)
    return {
        **runs[-1],
        "level": "all",
        "selection": None if whole else [case["id"] for case in cases],
        "cases": cases,
        "counts": {name: sum(c["outcome"] == name for c in cases) for name in OUTCOMES},
        "seconds": seconds + (earlier["seconds"] if earlier is not None else 0.0),
        "speed": None,
    }


def _alone(run: Run, case: Case) -> str:
    """Give the command that runs one case, or the few beside it, again."""
    from ..record.writing import run_alone, target
    from .checks import GROUP

    if case["group"] == GROUP:
        return f"python -m pdcore_conformance.gpu.checks {target(run)}"
    return run_alone(run, case)


def with_cases(run: Run, cases: Sequence[Case]) -> Run:
    """Add cases that are not the suite's to a run."""
    from ..record.writing import OUTCOMES

    every = [*run["cases"], *cases]
    seconds = run["seconds"] + sum(case["seconds"] for case in cases)
    counts = {name: sum(c["outcome"] == name for c in every) for name in OUTCOMES}
    return {**run, "cases": every, "counts": counts, "seconds": seconds}


def absent(target: str, reason: str) -> Run:
    """Make the run of a target that is not available."""
    from ..record import writing as record
    from ..record.environment import environment, versions

    name, _, device = target.partition(":")
    run = record.new_run(name, device)
    run["available"], run["reason"] = False, reason
    run["environment"], run["versions"] = environment(device), versions()
    return run


def summary(run: Run) -> Iterator[str]:
    """Say in a few lines what a run found."""
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
        yield f"    alone: {_alone(run, case)}"
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
