"""One run of `pdcore_conformance.gpu`: the stages, their files, and what was not reached."""

from __future__ import annotations

import argparse
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pdcore.errors import Exit

from .checks import is_check, is_checked
from .processes import (
    StageProcess,
    StageProcesses,
    core_count,
    process_environment,
    share_processes,
)
from .records import add_cases, merge_runs, summary, unavailable_run

if TYPE_CHECKING:
    from ..record.writing import Run

__all__ = ["Session"]

#: The share of the time after which the numerics are stopped, so that some time is left for speed.
NUMERICS_SHARE = 0.65
#: Seconds that a process has to finish by itself before it is stopped.
GRACE = 15.0
#: Seconds for importing a framework and listing the cases.
PROBE = 120.0
#: Seconds below which a measurement is not started.
LEAST = 5.0


class Session:
    """One run of the command.

    Parameters
    ----------
    targets : list of str
        Backends with their devices, as in ``"torch:cuda"``.
    options : argparse.Namespace
        The options of `pdcore_conformance.gpu.command`.

    Attributes
    ----------
    unreached : list of str
        What there was no time for, and what failed before it was complete.
    """

    def __init__(self, targets: list[str], options: argparse.Namespace) -> None:
        self.targets, self.options, self.out = targets, options, options.out
        self.started = time.monotonic()
        self.processes = StageProcesses(self.out)
        self.reasons: dict[str, str] = {}
        self.cases: dict[str, list[str]] = {}
        self.numerics: dict[str, Run] = {}
        self.speed: dict[str, Run] = {}
        self.unreached: list[str] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.processes.stop()

    @property
    def seconds_left(self) -> float:
        """The seconds that are left."""
        return float(self.options.budget_s - (time.monotonic() - self.started))

    def run(self) -> Exit:
        """Run every stage and return the exit code."""
        from ..record import writing as record

        commit, dirty = record.revision()
        self.say(f"commit {commit or 'unknown'}{', with changes' if dirty else ''}")
        if self.options.device == "cuda":
            self.save_nvidia_smi()
        self.probe()
        for target, reason in self.reasons.items():
            self.say(f"{target} is not available: {reason}")
        if not self.cases:
            where = "no GPU" if self.options.device == "cuda" else "nothing"
            self.say(f"{where}: none of {', '.join(self.targets)} can run here")
            return Exit.DONE if self.options.allow_missing else Exit.NO_BACKEND
        self.judge()
        self.check()
        if not self.options.no_speed:
            self.measure()
        return self.finish()

    # --- stages -----------------------------------------------------------------------------------

    def save_nvidia_smi(self) -> None:
        """Write the output of nvidia-smi to a file next to the records."""
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                ["nvidia-smi"], capture_output=True, text=True, timeout=30, check=True
            )
            (self.out / "nvidia-smi.txt").write_text(done.stdout, encoding="utf-8")

    def probe(self) -> None:
        """Ask each target, in its own process, whether it is available and which cases it has."""
        processes = [
            self.processes.start(
                "probe",
                target,
                self.job(target, []),
                process_environment(self.options.device, threads=1),
            )
            for target in self.targets
        ]
        self.processes.wait(processes, min(PROBE, self.seconds_left))
        for process in processes:
            answer = process.result()
            if answer is None:
                self.reasons[process.target] = f"it cannot even be asked: {process.last_words()}"
            elif answer["reason"] is not None:
                self.reasons[process.target] = answer["reason"]
            else:
                self.choose(process.target, answer["cases"])
                self.unreached += [
                    f"{process.target}: the known failure {name} is no case of the suite: remove it"
                    for name in answer["dead"]
                ]

    def choose(self, target: str, cases: list[str]) -> None:
        """Choose the cases of a target that are run."""
        chosen = set(self.options.case)
        self.cases[target] = [name for name in cases if not chosen or name in chosen]
        known = {name for name in chosen if is_checked(target) and is_check(name)} | set(cases)
        self.unreached += [f"{target}: there is no case {name}" for name in sorted(chosen - known)]

    def judge(self) -> None:
        """Run the numerics of all targets side by side, and write their records."""
        until = self.seconds_left - GRACE
        if not self.options.no_speed:
            until -= (1.0 - NUMERICS_SHARE) * self.options.budget_s
        earlier = {target: self.earlier_run(target) for target in self.cases}
        todo = {
            target: [name for name in cases if name not in _ids(earlier[target])]
            for target, cases in self.cases.items()
        }
        counts = share_processes({target: len(ids) for target, ids in todo.items()}, core_count())
        environment = process_environment(
            self.options.device, threads=max(1, core_count() // max(1, sum(counts.values())))
        )
        processes: dict[str, list[StageProcess]] = {}
        for target, ids in todo.items():
            count = counts.get(target, 0)
            kept = len(self.cases[target]) - len(ids)
            self.say(
                f"{target}: {len(ids)} cases in {count} processes"
                + (f", {kept} are kept from before" if kept else "")
            )
            processes[target] = [
                self.processes.start(
                    f"numerics.{index}",
                    target,
                    self.job(target, ids[index::count], until),
                    environment,
                )
                for index in range(count)
            ]
        everyone = [process for some in processes.values() for process in some]
        self.processes.wait(everyone, until + GRACE, lambda text: self.say(f"  {text}"))
        for target, some in processes.items():
            self.collect(target, earlier[target], some)

    def collect(self, target: str, earlier: Run | None, processes: list[StageProcess]) -> None:
        """Merge the records of a target's processes, and note the cases that are missing."""
        cases = self.cases[target]
        merged = merge_runs(
            earlier,
            [run for process in processes if (run := process.run()) is not None],
            cases,
            selected=bool(self.options.case),
        )
        self.unreached += [
            f"{target}, {process.stage}: {process.last_words()}"
            for process in processes
            if process.failed
        ]
        rest = [name for name in cases if name not in _ids(merged)]
        if rest:
            self.unreached.append(f"{target}: {len(rest)} of {len(cases)} cases, such as {rest[0]}")
        if merged is not None:
            self.write(target, "numerics", merged)
            self.numerics[target] = merged

    def check(self) -> None:
        """Check the CUDA kernels of the backends that have some, on the device itself."""
        chosen = set(self.options.case)
        for target, run in self.numerics.items():
            if not is_checked(target) or (chosen and not any(map(is_check, chosen))):
                continue
            share = 1.0 if self.options.no_speed else 0.3
            seconds = share * (self.seconds_left - GRACE)
            if seconds < LEAST:
                self.unreached.append(f"checks of {target}: no time was left")
                continue
            self.say(f"{target}: wrappers and sanitizers, {seconds:.0f} s at most")
            process = self.processes.start(
                "checks",
                target,
                self.job(target, [], seconds),
                process_environment(self.options.device),
            )
            self.processes.wait([process], seconds + GRACE)
            if process.failed:
                self.unreached.append(f"checks of {target}: {process.last_words()}")
            cases = [c for c in process.result() or [] if not chosen or c["id"] in chosen]
            for case in cases:
                if case["outcome"] == "not claimed":
                    self.say(f"  {case['id']}: {case['message']}")
            self.numerics[target] = add_cases(run, cases)
            self.write(target, "numerics", self.numerics[target])

    def measure(self) -> None:
        """Measure one target after another, those whose numerics are green."""
        waiting = self.unmeasured_targets()
        while waiting:
            target = waiting.pop(0)
            seconds = (self.seconds_left - GRACE) / (len(waiting) + 1)
            if seconds < LEAST:
                self.unreached.append(f"speed of {target}: no time was left")
                continue
            self.measure_target(target, seconds)

    def unmeasured_targets(self) -> list[str]:
        """List the targets that are to be measured; load the speed that an earlier run kept."""
        waiting = []
        for target in self.cases:
            run = self.numerics.get(target)
            if run is None or _red(run):
                self.unreached.append(f"speed of {target}: its numerics are not green")
                continue
            if self.options.resume and (kept := self.kept_runs(target, "speed")):
                rest = _unmeasured(kept[0])
                but = f", but for {len(rest)} parts" if rest else ""
                self.say(f"{target}: speed is kept from before{but}")
                self.write(target, "speed", kept[0])
                self.speed[target] = kept[0]
                if not rest:
                    continue
            waiting.append(target)
        return waiting

    def measure_target(self, target: str, seconds: float) -> None:
        """Measure the speed of a target, with so many seconds for all of it."""
        earlier = str(self.path(target, "speed")) if target in self.speed else None
        self.say(f"{target}: speed, nothing new after {seconds:.0f} s")
        process = self.processes.start(
            "speed",
            target,
            self.job(target, [], seconds, earlier),
            process_environment(self.options.device),
        )
        self.processes.wait([process], seconds + GRACE)
        run = process.run()
        if process.failed or run is None:
            self.unreached.append(f"speed of {target}: {process.last_words()}")
        if run is None or run["speed"] is None:
            return
        self.write(target, "speed", run)
        self.speed[target] = run
        self.unreached += [
            f"speed of {target}: not measured: {title}" for title in _unmeasured(run)
        ]

    def finish(self) -> Exit:
        """Write the merged record, print its summary, and return the exit code."""
        from ..record import writing as record

        runs: list[Run] = []
        for target, run in self.numerics.items():
            measured = self.speed.get(target)
            runs.append({**run, "speed": measured["speed"]} if measured is not None else run)
        runs += [unavailable_run(target, reason) for target, reason in self.reasons.items()]
        path = self.out / "record.json"
        record.save(path, runs, replace=True)
        for run in runs:
            for line in summary(run):
                self.say(line)
        for text in self.unreached:
            self.say(f"not reached: {text}")
        self.say(f"record: {path}")
        if any(_red(run) for run in runs):
            return Exit.NUMERICS
        if self.reasons and not self.options.allow_missing:
            return Exit.NO_BACKEND
        return Exit.FAILURE if self.unreached else Exit.DONE

    # --- files ------------------------------------------------------------------------------------

    def job(
        self, target: str, cases: list[str], seconds: float = 0.0, earlier: str | None = None
    ) -> dict[str, object]:
        """Return a `pdcore_conformance.gpu.stage.Job`, to which the process adds stage and file."""
        return {
            "target": target,
            "grid": self.options.grid,
            "cases": cases,
            "seconds": seconds,
            "earlier": earlier,
        }

    def path(self, target: str, stage: str) -> Path:
        """Return the path of a stage's record."""
        return Path(self.out, f"{target.replace(':', '-')}.{stage}.json")

    def write(self, target: str, stage: str, run: Run) -> None:
        """Write the record of a stage, and remove the partial records that it replaces."""
        from ..record import writing as record

        record.save(self.path(target, stage), [run], replace=True)
        for part in self.processes.parts(target, stage):
            part.unlink()

    def earlier_run(self, target: str) -> Run | None:
        """Return the numerics of a target that earlier runs of this commit recorded."""
        runs = self.kept_runs(target, "numerics") if self.options.resume else []
        earlier = merge_runs(None, runs, self.cases[target], selected=True)
        if earlier is not None:
            self.write(target, "numerics", earlier)
        for part in self.processes.parts(target, "numerics"):
            part.unlink()
        return earlier

    def kept_runs(self, target: str, stage: str) -> list[Run]:
        """Read the records of a stage that belong to this commit and grid."""
        from ..record import writing as record

        commit, _ = record.revision()
        kept = []
        for path in [self.path(target, stage), *self.processes.parts(target, stage)]:
            if not path.exists():
                continue
            try:
                runs = record.load(path)["runs"]
            except record.RecordError as error:
                self.say(f"{path} cannot be read, so its stage is repeated: {error}")
                continue
            for run in runs:
                if run["commit"] == commit and run["grid"] == self.options.grid:
                    kept.append(run)
                else:
                    self.say(f"{path} is of another commit or grid: its stage is repeated")
        return kept

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)


def _ids(run: Run | None) -> set[str]:
    return set() if run is None else {case["id"] for case in run["cases"]}


def _unmeasured(run: Run) -> list[str]:
    """List the steps that a measurement of speed has left out."""
    from ..bench.speed import unmeasured

    return [] if run["speed"] is None else unmeasured(run["speed"])


def _red(run: Run) -> bool:
    """Return whether a case failed, or a result at a timed shape was wrong."""
    bad = run["counts"]["failed"] + run["counts"]["error"]
    return bool(bad) or (run["speed"] is not None and run["speed"]["red"])
