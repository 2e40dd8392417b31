"""Mutate the NumPy backend and ArrayBackend by cosmic-ray, with the conformance suite as judge.

`python .ci/mutation.py` draws a sample of all mutations by a seed. On each it runs the cases of the
suite that run the mutated statement, until one fails. It works on copies of the code, prints the
survivors with their differences, and exits with 1 if one is not in .ci/survivors.toml, which says
why a survivor is right. With `--folder` the copies are kept there, and a run that was cut goes on.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("pdcore", "backends", "adapters", "conformance")
#: The backends by whose suites the mutations of a folder are judged. The NumPy backend has steps of
#: its own in place of some of `ArrayBackend`, and the strict backend has fewer features.
MUTATED = {
    "pdcore/backend": ("numpy", "strict --level core"),
    "backends/pdcore_backends/numpy": ("numpy",),
}
#: What is not mutated, and survivors that are no faults of the suite.
EXPLAINED = ROOT / ".ci" / "survivors.toml"
#: A mutation that loops or grows without end is noticed, by the seconds of its processor or by
#: its memory in KiB: the seconds on a clock depend on what else runs.
LIMITS = "ulimit -t 600 && ulimit -v 12000000"


def suite(backend: str, *more: str) -> list[str]:
    """Return the command that runs the suite of a backend until a case fails."""
    words = "-m pytest -x -q -p pdcore_conformance.runner.plugin -p no:cacheprovider --pyargs"
    options = ["pdcore_conformance.suite", "--backend", *backend.split(), *more]
    return [sys.executable, *words.split(), *options]


def configuration(mutated: str) -> str:
    """Return the configuration of cosmic-ray with `judge` as judge."""
    judge = f"{LIMITS} && {sys.executable} {Path(__file__).resolve()} --judge {mutated}"
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


def judge(mutated: str) -> int:
    """Run the cases that run the mutated statement, until one fails; return the exit code.

    The working folder is that of a `Copy`.
    """
    modules = (path.relative_to(ROOT) for path in (ROOT / mutated).rglob("*.py"))
    module = next(path for path in modules if path.read_bytes() != (ROOT / path).read_bytes())
    lines = statement(module)
    cases: dict[str, list[str]] = {}
    for backend in MUTATED[mutated]:
        known = json.loads(lines_file(backend).read_text(encoding="utf-8")).get(str(module), {})
        cases[backend] = sorted({name for line in lines for name in known.get(str(line), ())})
    for backend, names in cases.items():
        # Where no case of any backend runs the statement, it runs at an import, or never.
        if names or not any(cases.values()):
            status = subprocess.call(suite(backend, *(f"--case={name}" for name in names)))
            if status:
                return status
    return 0


def statement(module: Path) -> range:
    """Return the lines of the statement of a module in which a copy of it differs."""
    text = (ROOT / module).read_text(encoding="utf-8")
    changed = module.read_text(encoding="utf-8").splitlines()
    pairs = enumerate(zip(text.splitlines(), changed, strict=False), 1)
    line = next(number for number, (before, after) in pairs if before != after)
    spans = [range(line, line + 1)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            # Of a statement with others in it the head counts.
            inner = [child.lineno for child in ast.walk(node) if isinstance(child, ast.stmt)][1:]
            last = min(inner) - 1 if inner else node.end_lineno or node.lineno
            spans.append(range(node.lineno, max(last, node.lineno) + 1))
    return max((span for span in spans if line in span), key=len)


def lines_file(backend: str) -> Path:
    """Return where a `Copy` keeps which cases of a backend run which lines."""
    return Path(f"lines of {backend}.json")


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
            "SELECT job_id, module_path, definition_name, start_pos_row, start_pos_col "
            f"FROM mutation_specs ORDER BY {key}"
        ).fetchall()
        unread = {module: annotated(module) for module in {row[1] for row in rows}}
        unmutated = explained()["unmutated"]
        read = [
            row
            for row in rows
            if row[3:] not in unread[row[1]] and row[2] not in unmutated.get(row[1], ())
        ]
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
        # An earlier run that was cut may have left a mutation.
        for root in ROOTS:
            shutil.rmtree(self.folder / root, ignore_errors=True)
            shutil.copytree(ROOT / root, self.folder / root)
        (self.folder / "config.toml").write_text(configuration(mutated), encoding="utf-8")

    def start(self, command: list[str], **variables: str) -> subprocess.Popen[bytes]:
        """Start a command in the copy."""
        paths = [str(self.folder), *(str(self.folder / root) for root in ROOTS[1:])]
        paths += [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables |= {"PYTHONPATH": os.pathsep.join(paths), "PDCORE_PLUGINS": ""}
        return subprocess.Popen(command, cwd=self.folder, env=os.environ | variables)

    def cosmic_ray(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of cosmic-ray."""
        return self.start([sys.executable, "-m", "cosmic_ray.cli", *words])

    def prepare(self, count: int, seed: int) -> None:
        """Draw the mutations, unless an earlier run did."""
        if self.session.exists():
            return
        # A mutation counts as noticed only where the suite passes without it.
        for backend in MUTATED[self.mutated]:
            where = f"{self.folder / self.mutated}{os.pathsep}{lines_file(backend)}"
            run = self.start(suite(backend, "-p", "case_lines"), CASE_LINES=where)
            if status := run.wait():
                sys.exit(f"the suite of {backend} ended with {status} without a mutation")
        if status := self.cosmic_ray("init", "config.toml", self.session.name).wait():
            sys.exit(f"cosmic-ray init ended with {status}")
        keep(self.session, count, seed, self.mutated)

    def results(self) -> list[tuple[str, str, str, str]]:
        """Return the module, operator, outcome and difference of each mutation so far."""
        with sqlite3.connect(self.session) as database:
            return database.execute(
                "SELECT module_path, operator_name, test_outcome, diff FROM mutation_specs "
                "JOIN work_results USING (job_id) ORDER BY module_path, operator_name"
            ).fetchall()


def explained() -> dict[str, Any]:
    """Return what is in .ci/survivors.toml."""
    return tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))


def added_lines(difference: str) -> list[str]:
    """Return the lines that a mutation made of others."""
    return [line[1:].strip() for line in difference.splitlines() if line.startswith("+")]


def main() -> int:
    """Run a sample and print its survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=200, help="how many mutations")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the copies are kept")
    parser.add_argument("--judge", metavar="FOLDER", help="judge the mutation in a copy")
    arguments = parser.parse_args()
    if arguments.judge:
        return judge(arguments.judge)
    with tempfile.TemporaryDirectory() as temporary:
        parent = (arguments.folder or Path(temporary)).resolve()
        copies = [Copy(mutated, parent) for mutated in MUTATED]
        for copy in copies:
            copy.prepare(arguments.sample, arguments.seed)
        running = [copy.cosmic_ray("exec", "config.toml", copy.session.name) for copy in copies]
        if max(process.wait() for process in running):
            sys.exit("cosmic-ray exec failed")
        judged = [result for copy in copies for result in copy.results()]
    alive = [(m, o, diff) for m, o, outcome, diff in judged if outcome.upper() == "SURVIVED"]
    known = {(entry["module"], entry["line"]) for entry in explained()["survivor"]}
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
