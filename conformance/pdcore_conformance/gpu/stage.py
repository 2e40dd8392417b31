"""One stage of `pdcore_conformance.gpu`, in a process of its own.

::

    python -m pdcore_conformance.gpu.stage JOB.json

What it finds out is in the file that the job names: as a record, written again every few seconds,
so that nothing is lost where the process dies or is ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

__all__ = ["Job", "main"]

#: Seconds between two times that a record of cases is written.
INTERVAL = 5.0


class Job(TypedDict):
    """What a process is to do.

    Attributes
    ----------
    stage : {"probe", "numerics", "checks", "speed"}
    target : str
        ``"torch:cuda"``.
    cases : list of str
        The ids to run, in this order.
    seconds : float
        After which nothing more is begun.
    file : str
        Where the result goes.
    earlier : str or None
        A record to which a stage of speed adds what it lacks.
    """

    stage: str
    target: str
    grid: str
    cases: list[str]
    seconds: float
    file: str
    earlier: str | None


def main(path: str) -> int:
    """Do a job; give the exit code of the process."""
    job: Job = json.loads(Path(path).read_text(encoding="utf-8"))
    {"probe": probe, "numerics": numerics, "checks": checks, "speed": speed}[job["stage"]](job)
    return 0


def probe(job: Job) -> None:
    """Find out why a target is not available, or which cases it has: core ones first."""
    from pdcore.errors import NoBackendError
    from pdcore.plugins import registry as plugins

    from ..frameworks import framework
    from ..runner import conforming as running
    from ..runner import plugin

    name, device = plugin.parse_backend(job["target"])
    found: dict[str, Any] = {"reason": None, "cases": [], "dead": []}
    found["reason"] = framework(plugins.registered()[name].library).available(device)
    if found["reason"] is None:
        try:
            plugins.load_backend(name)
        except NoBackendError as error:
            found["reason"] = str(error)
    if found["reason"] is None:
        core, every = (
            running.list_cases(job["target"], level=level, grid=job["grid"])
            for level in ("core", "all")
        )
        known = running.list_cases(job["target"], grid="full")
        found["dead"] = sorted(set(plugins.known_failures(name)) - set(known))
        found["cases"] = [*core, *sorted(set(every) - set(core), key=every.index)]
    Path(job["file"]).write_text(json.dumps(found), encoding="utf-8")


class _InTime:
    """Ends a run of pytest in time, and writes its record now and then."""

    def __init__(self, job: Job) -> None:
        self.job, self.began, self.written = job, time.monotonic(), time.monotonic()
        self.conformance: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        """Look up the run that is being made."""
        from ..runner import plugin

        self.conformance = session.config.pluginmanager.get_plugin(plugin.NAME)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Run the cases in the order of the job."""
        from ..runner import plugin

        place = {name: index for index, name in enumerate(self.job["cases"])}
        items.sort(key=lambda item: place.get(plugin.case_id(item), -1))

    def pytest_runtest_logfinish(self) -> None:
        """Write, and end."""
        import pytest

        now = time.monotonic()
        if now - self.written > INTERVAL:
            self.written = now
            self.write({**self.conformance.run, "cases": list(self.conformance.cases.values())})
            print(f"cases {len(self.conformance.cases)}", flush=True)
        if now - self.began > self.job["seconds"]:
            pytest.exit("no time was left")

    def write(self, run: Any) -> None:
        """Write the record of the cases so far."""
        from ..record import writing as record

        counts = {n: sum(c["outcome"] == n for c in run["cases"]) for n in record.OUTCOMES}
        run = {**run, "counts": counts, "seconds": time.monotonic() - self.began}
        flags = os.environ.get("XLA_FLAGS")
        if flags and "jax" in run["versions"]:
            run["versions"] = {**run["versions"], "XLA_FLAGS": flags}
        record.save(self.job["file"], [run], replace=True)


def numerics(job: Job) -> None:
    """Run some cases of the suite."""
    from ..runner import conforming as running

    watch = _InTime(job)
    outcome = running.conform(job["target"], grid=job["grid"], cases=job["cases"], more=[watch])
    if outcome.run is None:
        raise RuntimeError(f"the suite did not start: pytest ended with {outcome.code}")
    watch.write(outcome.run)


def checks(job: Job) -> None:
    """Check what only the device can tell, and write after each case, see `gpu_checks`."""
    from . import checks as gpu_checks

    gpu_checks.unwind_when_ended()
    found = []
    for case in gpu_checks.cases(job["target"], job["seconds"]):
        found.append(case)
        Path(job["file"]).write_text(json.dumps(found), encoding="utf-8")


def speed(job: Job) -> None:
    """Measure speed, growth and memory."""
    from ..bench.speed import measure
    from ..judge.subject import Subject
    from ..record import writing as record
    from ..record.environment import environment, versions
    from ..runner import plugin

    name, device = plugin.parse_backend(job["target"])
    run = record.new_run(name, device)
    tested = Subject(name, device)
    began = time.perf_counter()
    run["environment"] = environment(device)
    run["versions"] = versions() | tested.backend.versions()
    run["precision"] = tested.framework.policy()
    run["grid"] = "full" if job["grid"] == "full" else "quick"

    def say(title: str, share: float) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {title}", flush=True)

    def keep(found: record.Speed) -> None:
        seconds = time.perf_counter() - began
        record.save(job["file"], [{**run, "speed": found, "seconds": seconds}], replace=True)

    earlier = record.load(job["earlier"])["runs"][0]["speed"] if job["earlier"] else None
    keep(
        measure(
            name,
            device,
            grid=job["grid"],
            deadline=job["seconds"],
            say=say,
            keep=keep,
            earlier=earlier,
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
