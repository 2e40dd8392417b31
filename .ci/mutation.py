"""Mutate the NumPy backend and ArrayBackend by cosmic-ray, with the conformance suite as judge.

`python .ci/mutation.py` draws a sample of all mutations by a seed, and runs the suite on each until
a case fails. It works on copies of the code, prints the survivors with their differences, and exits
with 1 if one is not in .ci/survivors.toml, which says why a survivor is right. With `--folder` the
copies are kept there, and a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("pdcore", "backends", "adapters", "conformance")
#: The backends by whose suite the mutations of a folder are judged. The NumPy backend has steps of
#: `ArrayBackend` that the strict backend leaves as they are, but fewer features are strict.
MUTATED = {
    "pdcore/backend": ("strict --level core", "numpy"),
    "backends/pdcore_backends/numpy": ("numpy",),
}
#: Survivors that are no faults of the suite: the module, the line as it became, and why.
EXPLAINED = ROOT / ".ci" / "survivors.toml"
#: A mutation that loops or grows without end is noticed, by the seconds of its processor or by
#: its memory in KiB: the seconds on a clock depend on what else runs.
LIMITS = "ulimit -t 600 && ulimit -v 12000000"


def configuration(backends: tuple[str, ...]) -> str:
    """Return the configuration of cosmic-ray with the suites of these backends as judge."""
    suite = (
        f"{sys.executable} -m pytest -x -q -p pdcore_conformance.runner.plugin "
        "-p no:cacheprovider --pyargs pdcore_conformance.suite --backend"
    )
    judge = " && ".join([LIMITS, *(f"{suite} {backend}" for backend in backends)])
    return "\n".join(
        [
            "[cosmic-ray]",
            f"module-path = {json.dumps(list(MUTATED))}",
            "timeout = 36000.0",
            "excluded-modules = []",
            f"test-command = {json.dumps(f'sh -c {json.dumps(judge)}')}",
            "[cosmic-ray.distributor]",
            'name = "local"',
            "",
        ]
    )


def annotated(module: str) -> set[tuple[int, int]]:
    """Return the lines and columns of a module that annotations take: they are not evaluated."""
    nodes = list(ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))))
    annotations = [getattr(node, "annotation", None) for node in nodes]
    annotations += [node.returns for node in nodes if isinstance(node, ast.FunctionDef)]
    return {
        (part.lineno, column)
        for annotation in annotations
        if annotation is not None
        for part in ast.walk(annotation)
        if isinstance(part, ast.expr)
        for column in range(part.col_offset, part.end_col_offset or 0)
    }


def keep(session: Path, count: int, seed: int, folder: str) -> None:
    """Keep those in a folder of this many mutations of all folders, drawn by the seed."""
    with sqlite3.connect(session) as database:
        key = "module_path, operator_name, occurrence, operator_args"
        rows = database.execute(
            "SELECT job_id, module_path, start_pos_row, start_pos_col FROM mutation_specs "
            f"ORDER BY {key}"
        ).fetchall()
        unread = {module: annotated(module) for module in {row[1] for row in rows}}
        read = [row for row in rows if row[2:] not in unread[row[1]]]
        kept = {row[0] for row in random.Random(seed).sample(read, min(count, len(read)))}
        left_out = [
            (row[0],) for row in rows if row[0] not in kept or not row[1].startswith(folder)
        ]
        for table in ("mutation_specs", "work_items"):
            database.executemany(f"DELETE FROM {table} WHERE job_id = ?", left_out)


class Copy:
    """A copy of the code in which the modules of one folder are mutated."""

    def __init__(self, mutated: str, parent: Path) -> None:
        self.mutated = mutated
        self.folder = parent / mutated.replace("/", "-")
        self.session = self.folder / "session.sqlite"
        if not self.folder.exists():
            for root in ROOTS:
                shutil.copytree(ROOT / root, self.folder / root)
        text = configuration(MUTATED[mutated])
        (self.folder / "config.toml").write_text(text, encoding="utf-8")

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of cosmic-ray."""
        paths = [str(self.folder), *(str(self.folder / root) for root in ROOTS[1:])]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PDCORE_PLUGINS": ""}
        command = [sys.executable, "-m", "cosmic_ray.cli", *words]
        return subprocess.Popen(command, cwd=self.folder, env=environment)

    def prepare(self, count: int, seed: int) -> None:
        """Draw the mutations, unless an earlier run did."""
        if self.session.exists():
            return
        # A mutation counts as noticed only where the suite passes without it.
        for words in (("baseline", "config.toml"), ("init", "config.toml", self.session.name)):
            if status := self.start(*words).wait():
                sys.exit(f"cosmic-ray {words[0]} ended with {status}")
        keep(self.session, count, seed, self.mutated)

    def results(self) -> list[tuple[str, str, str, str]]:
        """Return the module, operator, outcome and difference of each mutation so far."""
        with sqlite3.connect(self.session) as database:
            return database.execute(
                "SELECT module_path, operator_name, test_outcome, diff FROM mutation_specs "
                "JOIN work_results USING (job_id) ORDER BY module_path, operator_name"
            ).fetchall()


def explained() -> set[tuple[str, str]]:
    """Return the modules and lines of .ci/survivors.toml."""
    entries = tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))["survivor"]
    return {(entry["module"], entry["line"]) for entry in entries}


def added_lines(difference: str) -> list[str]:
    """Return the lines that a mutation made of others."""
    return [line[1:].strip() for line in difference.splitlines() if line.startswith("+")]


def main() -> int:
    """Run a sample and print its survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=200, help="how many mutations")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the copies are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        parent = (arguments.folder or Path(temporary)).resolve()
        copies = [Copy(mutated, parent) for mutated in MUTATED]
        for copy in copies:
            copy.prepare(arguments.sample, arguments.seed)
        running = [copy.start("exec", "config.toml", copy.session.name) for copy in copies]
        if max(process.wait() for process in running):
            sys.exit("cosmic-ray exec failed")
        judged = [result for copy in copies for result in copy.results()]
    alive = [(m, o, diff) for m, o, outcome, diff in judged if outcome.upper() == "SURVIVED"]
    known = explained()
    faults = [s for s in alive if not any((s[0], line) in known for line in added_lines(s[2]))]
    for module, operator, difference in faults:
        print(f"--- survived: {operator} in {module}\n{difference}")
    print(
        f"{len(judged)} mutations: {len(alive)} survived, {len(alive) - len(faults)} of them "
        f"explained in {EXPLAINED.name}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
