"""One run on a GPU: the stages in their order, their processes, and what is written."""

from __future__ import annotations

import argparse
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pdcore.errors import Exit

from ..record import writing as record
from ..runner import child
from ..runner.outcomes import new_case
from ..runner.watching import WatchedProcess
from . import worker
from .environment import core_count, process_environment
from .log import Log, archive, entries
from .records import runs_of, summary
from .stages import STAGES, Stage, deadlines
from .step import case_of

__all__ = ["Session"]

#: The stage that finds which backends are there, which all others need.
FIRST = "machine"
#: The most seconds for it; the minutes that it leaves are for the others.
IMPORTS = 90.0
#: Seconds between two archives, and those that processes have to end in at a signal.
SAVED, LAST_WORDS = 15.0, 3.0
#: Seconds that a stage must have left to start a process.
LEAST = 2.0


class Session:
    """One run of the command.

    Parameters
    ----------
    targets : list of str
        Backends with their devices, as in ``"torch:cuda"``.
    options : argparse.Namespace
        The options of `pdcore_conformance.gpu.command`.
    """

    def __init__(self, targets: list[str], options: argparse.Namespace, carried: list[str]) -> None:
        self.targets, self.options, self.folder = targets, options, options.folder
        earlier = entries(self.folder / "log.jsonl") if options.resume else []
        if not options.resume and (self.folder / "log.jsonl").exists():
            (self.folder / "log.jsonl").replace(self.folder / "log-before.jsonl")
        commit, dirty = record.revision()
        self.header = {"commit": commit, "dirty": dirty, "minutes": options.minutes}
        self.log = Log(self.folder, **self.header, stages=options.stages, carried=carried)
        self.header["created"] = self.log.created
        self.lines = self._kept(earlier)
        #: The number of steps for which no time was left, by stage and target.
        self.unreached: Counter[tuple[str, str]] = Counter()
        # Each with what to write where it is ended in a step.
        self._running: dict[WatchedProcess, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._closing = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes, and write what is known."""
        with self._lock:
            self._closing = True
            running = dict(self._running)
        self.save()
        for process in running:
            process.process.terminate()
        until = time.monotonic() + LAST_WORDS
        for process, cut in running.items():
            process.stop(max(0.0, until - time.monotonic()))
            cut()
        self.save()

    def _kept(self, earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the lines of an earlier run of this commit; a step that had no end has failed."""
        commit, kept = None, []
        for line in earlier:
            commit = line.get("commit", commit)
            if self.header["commit"] is not None and commit == self.header["commit"]:
                kept.append(line)
        if earlier and not kept:
            self.log.say("the earlier log is of another or an unknown commit: all is run again")
        open_: dict[tuple[str, str], dict[str, Any]] = {}
        for line in kept:
            if "began" in line:
                open_[line["target"], line["began"]] = line
            elif "done" in line or "cut" in line:
                open_.pop((line["target"], line.get("cut") or line["done"]["id"]), None)
        for (_, name), line in open_.items():
            done = new_case(name, "optional", [], "error", "the run ended in this step")
            kept.append({**line, "done": done})
        return kept

    # --- stages -----------------------------------------------------------------------------------

    def run(self) -> Exit:
        """Run the stages, and return the exit code."""
        commit = self.header["commit"]
        self.log.say(
            f"commit {commit or 'unknown'}{', with changes' if self.header['dirty'] else ''}"
        )
        self._save_nvidia_smi()
        self._run_stage(STAGES[FIRST], self.log.started + IMPORTS)
        now = time.monotonic()
        left = self.options.minutes - (now - self.log.started) / 60
        others = [name for name in self.options.stages if name != FIRST and self._present()]
        for name, end in deadlines(others, left).items():
            self._run_stage(STAGES[name], now + end)
        runs = runs_of(self.lines, self.header)
        for run in runs:
            for line in summary(run):
                self.log.say(line)
        for (stage, target), count in self.unreached.items():
            self.log.say(f"not reached: {stage} of {target}: {count} steps")
        self.log.say(f"all results: {self.options.archive}")
        available = [run for run in runs if run["available"]]
        if not available:
            return Exit.NO_BACKEND
        if any(run["counts"]["failed"] or run["counts"]["error"] for run in runs):
            return Exit.NUMERICS
        if len(available) < len(self.targets):
            return Exit.NO_BACKEND
        return Exit.FAILURE if self.unreached else Exit.DONE

    def _run_stage(self, stage: Stage, until: float) -> None:
        targets = self._targets(stage)
        left = until - time.monotonic()
        self.log.say(f"{stage.name}: {stage.about}, {max(left, 0):.0f} s", stage=stage.name)
        began = time.monotonic()
        for index, group in enumerate([targets] if stage.together else [[t] for t in targets]):
            # Backends one after the other share what is left of the time.
            turns = 1 if stage.together else len(targets) - index
            share = time.monotonic() + (until - time.monotonic()) / turns
            self._run_group(stage, group, share)
        seconds = time.monotonic() - began
        self.log.say(f"{stage.name}: done after {seconds:.1f} s", stage=stage.name, seconds=seconds)
        self.save()

    def _present(self) -> list[str]:
        """Return the targets that are available here, as the first stage has found."""
        name = case_of(FIRST, "versions")
        passed = {
            line["target"]
            for line in self.lines
            if line.get("done", {}).get("id") == name and line["done"]["outcome"] == "passed"
        }
        return [target for target in self.targets if target in passed]

    def _targets(self, stage: Stage) -> list[str]:
        """Return the targets of a stage, in its order; without a GPU others may stand in."""
        there = self.targets if stage.name == FIRST else self._present()
        here = {target.partition(":")[0]: target for target in there}
        chosen = [here[name] for name in stage.backends if name in here]
        if self.options.device == "cpu":
            others = [target for target in here.values() if target not in chosen]
            # Backends of plugins have all stages, those of other stages only where no other is.
            built_in = {f"{name}:cpu" for name in ("torch", "jax")}
            chosen += [t for t in others if not chosen or t not in built_in]
        return chosen[:1] if stage.first else chosen

    def _run_group(self, stage: Stage, targets: Sequence[str], until: float) -> None:
        """Run the steps of a stage that are not done, for targets at the same time."""
        shares: list[tuple[str, list[str]]] = []
        for target in targets:
            done = {
                line["done"]["id"]
                for line in self.lines
                if "done" in line and line["target"] == target
            }
            rest = [n for n in self._steps(stage, target, until) if _id(stage, n) not in done]
            count = int(max(1, min(stage.processes, len(rest))))
            shares += [(target, rest[index::count]) for index in range(count) if rest]
        waiting, threads = iter(shares), []

        def work() -> None:
            while True:
                with self._lock:
                    share = next(waiting, None)
                if share is None:
                    return
                self._run_steps(stage, *share, until)

        for _ in range(min(len(shares), max(core_count(), len(targets)))):
            threads.append(threading.Thread(target=work, daemon=True))
            threads[-1].start()
        # A signal is handled between two short waits.
        saved = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.1)
            threads.sort(key=lambda thread: not thread.is_alive())
            if time.monotonic() - saved > SAVED:
                self.save()
                saved = time.monotonic()

    def _steps(self, stage: Stage, target: str, until: float) -> Sequence[str]:
        steps = stage.steps(target)
        if stage.name != "suite":
            return steps
        if self.options.case or steps:
            return self.options.case or steps
        options = {"backend": target, "level": "core", "collect_only": True}
        with WatchedProcess(child.__name__, options, self._environment(stage)) as process:
            process.wait(stage.limit, until=until)
            return [about["id"] for about in process.journal.planned]

    def _run_steps(self, stage: Stage, target: str, names: Sequence[str], until: float) -> None:
        """Run steps in a process, and the rest in another where it ends before them."""
        rest = list(names)
        while rest:
            left = until - time.monotonic()
            if left < LEAST or self._closing:
                with self._lock:
                    self.unreached[stage.name, target] += len(rest)
                return
            rest = self._run_process(stage, target, rest, until)

    def _run_process(self, stage: Stage, target: str, names: list[str], until: float) -> list[str]:
        """Run steps in one process; return those that it did not come to."""
        if stage.name == "suite":
            module = child.__name__
            options: dict[str, Any] = {"backend": target, "level": "core", "cases": names}
        else:
            module = worker.__name__
            seconds = until - time.monotonic()
            options = {"stage": stage.name, "target": target, "cases": names, "seconds": seconds}

        def heard(entry: dict[str, Any]) -> None:
            for name in ("began", "done"):
                if name in entry:
                    found = {"found": entry["found"]} if entry.get("found") else {}
                    self._note(stage, target, **{name: entry[name]}, **found)

        with WatchedProcess(module, options, self._environment(stage)) as process:
            journal = process.journal

            def cut() -> None:
                if journal.current is not None:
                    self._note(stage, target, cut=journal.current)

            with self._lock:
                self._running[process] = cut
                until = time.monotonic() if self._closing else until
            process.wait(stage.limit, heard, until)
            in_time = process.process.poll() is not None
            process.stop()
            for entry in journal.read():
                heard(entry)
            with self._lock:
                del self._running[process]
            how, printed = journal.refused or process.how(), process.printed()
        rest = [name for name in names if _id(stage, name) not in journal.cases]
        if journal.code is not None or self._closing:
            return []
        if journal.current is not None and not in_time:
            cut()
            return rest
        if journal.current is not None:
            message = f"the process ended: {how}; it printed: {printed[:1000]}"
            done = new_case(journal.current, "optional", [], "error", message)
            self._note(stage, target, done=done)
            return [name for name in rest if _id(stage, name) != journal.current]
        if journal.lost is None and in_time and len(rest) == len(names):
            # It ended before the first step: another process would, too.
            message = f"the process did not start: {how}; it printed: {printed[:1000]}"
            for name in rest:
                done = new_case(_id(stage, name), "optional", [], "error", message)
                self._note(stage, target, done=done)
            return []
        return rest

    def _environment(self, stage: Stage) -> dict[str, str]:
        """Return the variables of a process: with few threads where it is one of many."""
        threads = None if stage.name in ("speed", "variants", "rates") else 2
        return process_environment(self.options.device, threads=threads)

    # --- files ------------------------------------------------------------------------------------

    def _note(self, stage: Stage, target: str, **entry: Any) -> None:
        line = {"stage": stage.name, "target": target, **entry}
        with self._lock:
            self.lines.append(line)
        self.log.write(**line)
        done = entry.get("done")
        if done and done["outcome"] in ("failed", "error"):
            text = " ".join((done["message"] or "").split())[:300]
            self.log.say(f"  {done['outcome']}: {target}: {done['id']}: {text}")

    def save(self) -> None:
        """Write the record of what is known, and the archive."""
        with self._lock:
            lines = list(self.lines)
        record.save(self.folder / "record.json", runs_of(lines, self.header), replace=True)
        for name in archive(self.folder, self.options.archive):
            self.log.say(f"left out of the archive, for its size: {name}")

    def _save_nvidia_smi(self) -> None:
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                ["nvidia-smi"], capture_output=True, text=True, timeout=30, check=True
            )
            (self.folder / "nvidia-smi.txt").write_text(done.stdout, encoding="utf-8")


def _id(stage: Stage, name: str) -> str:
    """Return the id of a step; those of the suite have theirs."""
    return name if stage.name == "suite" else case_of(stage.name, name)
