"""Everything that needs a GPU, by one command on a machine whose Python has the frameworks.

::

    python -m pdcore_conformance.gpu --out gpu-records

It installs nothing. First the numerics of every backend, each in processes of its own and all of
them side by side; then, of a backend with CUDA kernels of its own, every wrapper of PTX bit by bit,
and small calls under compute-sanitizer where that is on the path; then speed, one backend after
another, where all that is green. Each stage's record is written as it ends, and ``--resume`` goes
on where an earlier run of the same commit stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pdcore.errors import Exit

from .checks import is_check, is_checked
from .records import absent, joined, summary, with_cases
from .workers import Work, Workers, cores, shares, variables

if TYPE_CHECKING:
    from ..record.writing import Run

__all__ = ["TARGETS", "Session", "main"]

#: What is judged, by default on CUDA.
TARGETS = ("torch", "jax", "cupy")
NEEDED = ("numpy", "pluggy", "array_api_compat", "pytest", "hypothesis", "msgspec")
#: The share of the time after which the numerics are ended, so that some is left for speed.
NUMERICS_SHARE = 0.65
#: Seconds that a process gets to come to its end before it is ended.
GRACE = 15.0
#: Seconds for importing a framework and listing the cases.
PROBE = 120.0
#: Seconds below which measuring is not begun.
LEAST = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit code, see `pdcore.cli.Exit`."""
    options = _parser().parse_args(arguments)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"gpu: not installed: {', '.join(missing)}", file=sys.stderr)
        return int(Exit.MISSING)
    from pdcore.plugins import registry as plugins

    names = [name for text in options.only or TARGETS for name in text.split(",")]
    known = plugins.registered()
    for name in names:
        if name not in known:
            print(
                f"gpu: --only: unknown backend {name!r}; expected some of {', '.join(known)}",
                file=sys.stderr,
            )
            return int(Exit.USAGE)
    if options.device == "cpu" and not options.only:
        names = [name for name in names if "cpu" in known[name].devices]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu: --out: {options.out}: {error.strerror}", file=sys.stderr)
        return int(Exit.OUTPUT)
    with Session([f"{name}:{options.device}" for name in names], options) as session:
        return int(session.run())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pdcore_conformance.gpu",
        description="Judge and measure the backends on this machine's GPU; installs nothing.",
        epilog="Exit codes: 0 done; 1 not all was reached; 5 no GPU, or a framework without one; "
        "7 a case fails; 9 a package is missing.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-records"),
        metavar="FOLDER",
        help="where the records go (default: %(default)s)",
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        default=480.0,
        metavar="SECONDS",
        help="begin nothing after these (default: %(default)g)",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME,...",
        help=f"only these backends (default: {','.join(TARGETS)})",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what an earlier run of this commit has finished"
    )
    parser.add_argument(
        "--grid",
        choices=("quick", "full"),
        default="quick",
        help="sizes, dtypes and shapes (default: quick)",
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command itself")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="only this case; may be given several times",
    )
    parser.add_argument("--no-speed", action="store_true", help="numerics only")
    parser.add_argument(
        "--allow-missing", action="store_true", help="succeed where a backend is not available here"
    )
    return parser


class Session:
    """One run of the command.

    Attributes
    ----------
    unreached : list of str
        What there was no time for, or what ended before its end.
    """

    def __init__(self, targets: list[str], options: argparse.Namespace) -> None:
        self.targets, self.options, self.out = targets, options, options.out
        self.began = time.monotonic()
        self.workers = Workers(self.out)
        self.reasons: dict[str, str] = {}
        self.wanted: dict[str, list[str]] = {}
        self.numerics: dict[str, Run] = {}
        self.speed: dict[str, Run] = {}
        self.unreached: list[str] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.workers.end()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return float(self.options.budget_s - (time.monotonic() - self.began))

    def run(self) -> Exit:
        """Do everything, and say how it went."""
        from ..record import writing as record

        commit, dirty = record.revision()
        self.say(f"commit {commit or 'unknown'}{', with changes' if dirty else ''}")
        if self.options.device == "cuda":
            self.ask_nvidia_smi()
        self.probe()
        for target, reason in self.reasons.items():
            self.say(f"{target} is not available: {reason}")
        if not self.wanted:
            where = "no GPU" if self.options.device == "cuda" else "nothing"
            self.say(f"{where}: none of {', '.join(self.targets)} can run here")
            return Exit.DONE if self.options.allow_missing else Exit.NO_BACKEND
        self.judge()
        self.check()
        if not self.options.no_speed:
            self.measure()
        return self.finish()

    # --- stages -----------------------------------------------------------------------------------

    def ask_nvidia_smi(self) -> None:
        """Keep what nvidia-smi says beside the records."""
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                ["nvidia-smi"], capture_output=True, text=True, timeout=30, check=True
            )
            (self.out / "nvidia-smi.txt").write_text(done.stdout, encoding="utf-8")

    def probe(self) -> None:
        """Ask each target, in a process of its own, whether it is there and for its cases."""
        works = [
            self.workers.start(
                "probe", target, self.job(target, []), variables(self.options.device, threads=1)
            )
            for target in self.targets
        ]
        self.workers.wait(works, min(PROBE, self.left))
        for work in works:
            found = work.found()
            if found is None:
                self.reasons[work.target] = f"it cannot even be asked: {work.last_words()}"
            elif found["reason"] is not None:
                self.reasons[work.target] = found["reason"]
            else:
                self.choose(work.target, found["cases"])
                self.unreached += [
                    f"{work.target}: the known failure {name} is no case of the suite: remove it"
                    for name in found["dead"]
                ]

    def choose(self, target: str, cases: list[str]) -> None:
        """Settle which of the cases are run."""
        chosen = set(self.options.case)
        self.wanted[target] = [name for name in cases if not chosen or name in chosen]
        known = {name for name in chosen if is_checked(target) and is_check(name)} | set(cases)
        self.unreached += [f"{target}: there is no case {name}" for name in sorted(chosen - known)]

    def judge(self) -> None:
        """Run the numerics of all targets side by side, and write their records."""
        until = self.left - GRACE
        if not self.options.no_speed:
            until -= (1.0 - NUMERICS_SHARE) * self.options.budget_s
        earlier = {target: self.earlier(target) for target in self.wanted}
        todo = {
            target: [name for name in wanted if name not in _ids(earlier[target])]
            for target, wanted in self.wanted.items()
        }
        share = shares({target: len(ids) for target, ids in todo.items()}, cores())
        room = variables(
            self.options.device, threads=max(1, cores() // max(1, sum(share.values())))
        )
        works: dict[str, list[Work]] = {}
        for target, ids in todo.items():
            count = share.get(target, 0)
            kept = len(self.wanted[target]) - len(ids)
            self.say(
                f"{target}: {len(ids)} cases in {count} processes"
                + (f", {kept} are kept from before" if kept else "")
            )
            works[target] = [
                self.workers.start(
                    f"numerics.{index}", target, self.job(target, ids[index::count], until), room
                )
                for index in range(count)
            ]
        everyone = [work for some in works.values() for work in some]
        self.workers.wait(everyone, until + GRACE, lambda text: self.say(f"  {text}"))
        for target, some in works.items():
            self.collect(target, earlier[target], some)

    def collect(self, target: str, earlier: Run | None, works: list[Work]) -> None:
        """Put the parts of a target together, and name what is missing."""
        wanted = self.wanted[target]
        found = joined(
            earlier,
            [run for work in works if (run := work.run()) is not None],
            wanted,
            selected=bool(self.options.case),
        )
        self.unreached += [
            f"{target}, {work.stage}: {work.last_words()}" for work in works if work.failed
        ]
        rest = [name for name in wanted if name not in _ids(found)]
        if rest:
            self.unreached.append(
                f"{target}: {len(rest)} of {len(wanted)} cases, such as {rest[0]}"
            )
        if found is not None:
            self.write(target, "numerics", found)
            self.numerics[target] = found

    def check(self) -> None:
        """Check the kernels of the backends that have some by the device itself."""
        chosen = set(self.options.case)
        for target, run in self.numerics.items():
            if not is_checked(target) or (chosen and not any(map(is_check, chosen))):
                continue
            share = 1.0 if self.options.no_speed else 0.3
            seconds = share * (self.left - GRACE)
            if seconds < LEAST:
                self.unreached.append(f"checks of {target}: no time was left")
                continue
            self.say(f"{target}: wrappers and sanitizers, {seconds:.0f} s at most")
            work = self.workers.start(
                "checks", target, self.job(target, [], seconds), variables(self.options.device)
            )
            self.workers.wait([work], seconds + GRACE)
            if work.failed:
                self.unreached.append(f"checks of {target}: {work.last_words()}")
            found = [c for c in work.found() or [] if not chosen or c["id"] in chosen]
            for case in found:
                if case["outcome"] == "not claimed":
                    self.say(f"  {case['id']}: {case['message']}")
            self.numerics[target] = with_cases(run, found)
            self.write(target, "numerics", self.numerics[target])

    def measure(self) -> None:
        """Measure one target after another, where the numerics are green."""
        waiting = []
        for target in self.wanted:
            run = self.numerics.get(target)
            if run is None or _red(run):
                self.unreached.append(f"speed of {target}: its numerics are not green")
                continue
            if self.options.resume and (kept := self.kept(target, "speed")):
                rest = _unmeasured(kept[0])
                left = f", but for {len(rest)} parts" if rest else ""
                self.say(f"{target}: speed is kept from before{left}")
                self.write(target, "speed", kept[0])
                self.speed[target] = kept[0]
                if not rest:
                    continue
            waiting.append(target)
        while waiting:
            target = waiting.pop(0)
            seconds = (self.left - GRACE) / (len(waiting) + 1)
            if seconds < LEAST:
                self.unreached.append(f"speed of {target}: no time was left")
                continue
            earlier = str(self.path(target, "speed")) if target in self.speed else None
            self.say(f"{target}: speed, nothing new after {seconds:.0f} s")
            work = self.workers.start(
                "speed",
                target,
                self.job(target, [], seconds, earlier),
                variables(self.options.device),
            )
            self.workers.wait([work], seconds + GRACE)
            run = work.run()
            if work.failed or run is None:
                self.unreached.append(f"speed of {target}: {work.last_words()}")
            if run is None or run["speed"] is None:
                continue
            self.write(target, "speed", run)
            self.speed[target] = run
            self.unreached += [
                f"speed of {target}: not measured: {title}" for title in _unmeasured(run)
            ]

    def finish(self) -> Exit:
        """Write the merged record, and say how it went."""
        from ..record import writing as record

        runs: list[Run] = []
        for target, run in self.numerics.items():
            measured = self.speed.get(target)
            runs.append({**run, "speed": measured["speed"]} if measured is not None else run)
        runs += [absent(target, reason) for target, reason in self.reasons.items()]
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
        """Describe what a process is to do, see `pdcore_conformance.gpu.stage.Job`."""
        return {
            "target": target,
            "grid": self.options.grid,
            "cases": cases,
            "seconds": seconds,
            "earlier": earlier,
        }

    def path(self, target: str, stage: str) -> Path:
        """Name the file of a stage."""
        return Path(self.out, f"{target.replace(':', '-')}.{stage}.json")

    def write(self, target: str, stage: str, run: Run) -> None:
        """Write the record of a stage, and remove what it was put together from."""
        from ..record import writing as record

        record.save(self.path(target, stage), [run], replace=True)
        for part in self.workers.parts(target, stage):
            part.unlink()

    def earlier(self, target: str) -> Run | None:
        """Give what earlier runs of this commit found out about the numerics of a target."""
        runs = self.kept(target, "numerics") if self.options.resume else []
        found = joined(None, runs, self.wanted[target], selected=True)
        if found is not None:
            self.write(target, "numerics", found)
        for part in self.workers.parts(target, "numerics"):
            part.unlink()
        return found

    def kept(self, target: str, stage: str) -> list[Run]:
        """Read the records of a stage that belong to this commit and grid."""
        from ..record import writing as record

        commit, _ = record.revision()
        found = []
        for path in [self.path(target, stage), *self.workers.parts(target, stage)]:
            if not path.exists():
                continue
            try:
                runs = record.load(path)["runs"]
            except record.RecordError as error:
                self.say(f"{path} cannot be read, so its stage is repeated: {error}")
                continue
            for run in runs:
                if run["commit"] == commit and run["grid"] == self.options.grid:
                    found.append(run)
                else:
                    self.say(f"{path} is of another commit or grid: its stage is repeated")
        return found

    def say(self, text: str) -> None:
        """Print a line, with the time."""
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)


def _ids(run: Run | None) -> set[str]:
    return set() if run is None else {case["id"] for case in run["cases"]}


def _unmeasured(run: Run) -> list[str]:
    """List what a stage of speed has left out."""
    from ..bench.speed import unmeasured

    return [] if run["speed"] is None else unmeasured(run["speed"])


def _red(run: Run) -> bool:
    """Whether a case failed, or a number at a timed shape was wrong."""
    bad = run["counts"]["failed"] + run["counts"]["error"]
    return bool(bad) or (run["speed"] is not None and run["speed"]["red"])


if __name__ == "__main__":
    sys.exit(main())
