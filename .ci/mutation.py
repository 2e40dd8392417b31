"""Mutate the NumPy backend and ArrayBackend by cosmic-ray, with the conformance suite as judge.

`python .ci/mutation.py` draws a sample of all mutations by a seed, and runs the suite on each until
a case fails. It works on copies of the code, one for each of `--jobs`, prints the survivors with
their differences, and exits with 1 if one is not among those that docs/mutants.md explains. With
`--folder` the copies are kept there, and a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("pdcore", "backends", "adapters", "conformance")
MUTATED = ("pdcore/backend", "backends/pdcore_backends/numpy")
#: Runs the suite until a case fails: on both backends, since the NumPy backend overrides steps.
JUDGE = " && ".join(
    f"{sys.executable} -m pytest -x -q -p pdcore_conformance.runner.plugin -p no:cacheprovider "
    f"--pyargs pdcore_conformance.suite --backend {backend}"
    for backend in ("strict --level core", "numpy")
)
#: A mutation that loops or grows without end is noticed, by the seconds of its processor or by
#: its memory in KiB: the seconds on a clock depend on what else runs.
LIMITS = "ulimit -t 600 && ulimit -v 12000000"


def configuration() -> str:
    """Return the configuration of cosmic-ray."""
    judge = f"sh -c {json.dumps(f'{LIMITS} && {JUDGE}')}"
    return "\n".join(
        [
            "[cosmic-ray]",
            f"module-path = {json.dumps(MUTATED)}",
            "timeout = 36000.0",
            "excluded-modules = []",
            f"test-command = {json.dumps(judge)}",
            "[cosmic-ray.distributor]",
            'name = "local"',
            "",
        ]
    )


def keep(session: Path, count: int, seed: int, part: slice) -> None:
    """Keep a part of this many mutations of a session, drawn by the seed."""
    with sqlite3.connect(session) as database:
        key = "module_path, operator_name, occurrence, operator_args"
        rows = database.execute(f"SELECT job_id FROM mutation_specs ORDER BY {key}").fetchall()
        kept = set(random.Random(seed).sample(rows, min(count, len(rows)))[part])
        for table in ("mutation_specs", "work_items"):
            left_out = [row for row in rows if row not in kept]
            database.executemany(f"DELETE FROM {table} WHERE job_id = ?", left_out)


def results(session: Path) -> list[tuple[str, str, str, str]]:
    """Return the module, operator, outcome and difference of each mutation that was judged."""
    with sqlite3.connect(session) as database:
        return database.execute(
            "SELECT module_path, operator_name, test_outcome, diff FROM mutation_specs "
            "JOIN work_results USING (job_id) ORDER BY module_path, operator_name"
        ).fetchall()


class Copy:
    """A copy of the code, and a session of cosmic-ray that mutates it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session = folder / "session.sqlite"
        if not folder.exists():
            for root in ROOTS:
                shutil.copytree(ROOT / root, folder / root)
        (folder / "config.toml").write_text(configuration(), encoding="utf-8")

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of cosmic-ray in the copy."""
        paths = [str(self.folder), *(str(self.folder / root) for root in ROOTS[1:])]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PDCORE_PLUGINS": ""}
        command = [sys.executable, "-m", "cosmic_ray.cli", *words]
        return subprocess.Popen(command, cwd=self.folder, env=environment)

    def run(self, *words: str) -> None:
        """Run a command of cosmic-ray, and exit where it fails."""
        if status := self.start(*words).wait():
            sys.exit(f"cosmic-ray {' '.join(words)} ended with {status}")


def main() -> int:
    """Run a sample and print its survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=200, help="how many mutations")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time")
    parser.add_argument("--folder", type=Path, help="where the copies are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        copies = [Copy(folder / str(i)) for i in range(arguments.jobs)]
        new = [i for i, copy in enumerate(copies) if not copy.session.exists()]
        if new:
            # A mutation counts as noticed only where the suite passes without it.
            copies[new[0]].run("baseline", "config.toml")
        for i in new:
            copies[i].run("init", "config.toml", copies[i].session.name)
            part = slice(i, None, arguments.jobs)
            keep(copies[i].session, arguments.sample, arguments.seed, part)
        running = [copy.start("exec", "config.toml", copy.session.name) for copy in copies]
        if max(process.wait() for process in running):
            sys.exit("cosmic-ray exec failed")
        judged = [result for copy in copies for result in results(copy.session)]
    alive = [r for r in judged if r[2].upper() == "SURVIVED"]
    for module, operator, _, difference in alive:
        print(f"--- survived: {operator} in {module}\n{difference}")
    print(f"{len(alive)} of {len(judged)} mutations survived")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
