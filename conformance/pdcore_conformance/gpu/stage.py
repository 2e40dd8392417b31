"""Run one stage of `pdcore_conformance.gpu` for one target, in its own process.

::

    python -m pdcore_conformance.gpu.stage JOB.json

The result goes to the file that the job names. A record is written again every few seconds, so
that nothing is lost when the process crashes or is stopped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

__all__ = ["Job", "main"]

#: Seconds after which the record of the cases is written again.
INTERVAL = 5.0


class Job(TypedDict):
    """What a process has to do.

    Attributes
    ----------
    stage : {"probe", "numerics", "checks", "speed"}
    target : str
        ``"torch:cuda"``.
    cases : list of str
        The ids to run, in this order.
    seconds : float
        The time after which nothing more is started.
    file : str
        The path of the result.
    earlier : str or None
        The path of a record whose missing measurements the stage of speed adds.
    """

    stage: str
    target: str
    grid: str
    cases: list[str]
    seconds: float
    file: str
    earlier: str | None


def main(path: str) -> int:
    """Run the job in a file; return the exit code of the process."""
    job: Job = json.loads(Path(path).read_text(encoding="utf-8"))
    {"probe": probe, "numerics": numerics, "checks": checks, "speed": speed}[job["stage"]](job)
    return 0


def probe(job: Job) -> None:
    """Write why a target is not available, or its cases, the core ones first."""
    from pdcore.errors import NoBackendError
    from pdcore.plugins import registry as plugins

    from ..frameworks import framework
    from ..runner import conforming as running
    from ..runner import plugin

    name, device = plugin.parse_backend(job["target"])
    answer: dict[str, Any] = {"reason": None, "cases": [], "dead": []}
    answer["reason"] = framework(plugins.registered()[name].library).available(device)
    if answer["reason"] is None:
        try:
            plugins.load_backend(name)
        except NoBackendError as error:
            answer["reason"] = str(error)
    if answer["reason"] is None:
        core, every = (
            running.list_cases(job["target"], level=level, grid=job["grid"])
            for level in ("core", "all")
        )
        known = running.list_cases(job["target"], grid="full")
        answer["dead"] = sorted(set(plugins.known_failures(name)) - set(known))
        answer["cases"] = [*core, *sorted(set(every) - set(core), key=every.index)]
    Path(job["file"]).write_text(json.dumps(answer), encoding="utf-8")


class _Watch:
    """A pytest plug-in that ends the run in time, and writes its record every few seconds."""

    def __init__(self, job: Job) -> None:
        self.job, self.started, self.written = job, time.monotonic(), time.monotonic()
        self.conformance: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        """Find the plug-in of the suite, which collects the cases."""
        from ..runner import plugin

        self.conformance = session.config.pluginmanager.get_plugin(plugin.NAME)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Run the cases in the order of the job."""
        from ..runner.cases import case_id

        place = {name: index for index, name in enumerate(self.job["cases"])}
        items.sort(key=lambda item: place.get(case_id(item), -1))

    def pytest_runtest_logfinish(self) -> None:
        """Write the record when it is due, and end the run when its time is over."""
        import pytest

        now = time.monotonic()
        if now - self.written > INTERVAL:
            self.written = now
            self.write({**self.conformance.run, "cases": list(self.conformance.cases.values())})
            print(f"cases {len(self.conformance.cases)}", flush=True)
        if now - self.started > self.job["seconds"]:
            pytest.exit("no time was left")

    def write(self, run: Any) -> None:
        """Write the record of the cases so far."""
        from ..record import writing as record

        counts = {n: sum(c["outcome"] == n for c in run["cases"]) for n in record.OUTCOMES}
        run = {**run, "counts": counts, "seconds": time.monotonic() - self.started}
        flags = os.environ.get("XLA_FLAGS")
        if flags and "jax" in run["versions"]:
            run["versions"] = {**run["versions"], "XLA_FLAGS": flags}
        record.save(self.job["file"], [run], replace=True)


def numerics(job: Job) -> None:
    """Run some cases of the suite."""
    from ..runner import conforming as running

    watch = _Watch(job)
    outcome = running.conform(job["target"], grid=job["grid"], cases=job["cases"], more=[watch])
    if outcome.run is None:
        raise RuntimeError(f"the suite did not start: pytest ended with {outcome.code}")
    watch.write(outcome.run)


def checks(job: Job) -> None:
    """Run `pdcore_conformance.gpu.checks`, and write its cases after each of them."""
    from . import checks as gpu_checks

    gpu_checks.exit_on_sigterm()
    cases = []
    for case in gpu_checks.cases(job["target"], job["seconds"]):
        cases.append(case)
        Path(job["file"]).write_text(json.dumps(cases), encoding="utf-8")


def speed(job: Job) -> None:
    """Measure speed, growth and memory."""
    from ..bench.speed import measure
    from ..judge.subject import Subject
    from ..record import writing as record
    from ..record.environment import environment, versions
    from ..runner import plugin

    name, device = plugin.parse_backend(job["target"])
    run = record.new_run(name, device)
    subject = Subject(name, device)
    started = time.perf_counter()
    run["environment"] = environment(device)
    run["versions"] = versions() | subject.backend.versions()
    run["precision"] = subject.framework.policy()
    run["grid"] = "full" if job["grid"] == "full" else "quick"

    def say(title: str, share: float) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {title}", flush=True)

    def keep(measured: record.Speed) -> None:
        seconds = time.perf_counter() - started
        record.save(job["file"], [{**run, "speed": measured, "seconds": seconds}], replace=True)

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
