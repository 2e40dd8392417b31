"""Mutate the NumPy backend and ArrayBackend by cosmic-ray, with the conformance suite as judge.

`python .ci/mutation.py` draws a sample of all mutations by a seed, and runs the suite on each until
a case fails. It works on a copy of the code, prints the survivors with their differences, and exits
with 1 if there is one.
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
    for backend in ("numpy", "strict --level core")
)


def configuration(seconds: float) -> str:
    """Return the configuration of cosmic-ray."""
    return "\n".join(
        [
            "[cosmic-ray]",
            f"module-path = {json.dumps(MUTATED)}",
            f"timeout = {seconds}",
            "excluded-modules = []",
            f"test-command = {json.dumps(f'sh -c {json.dumps(JUDGE)}')}",
            "[cosmic-ray.distributor]",
            'name = "local"',
            "",
        ]
    )


def keep(session: Path, count: int, seed: int) -> None:
    """Keep this many mutations of a session, drawn by the seed."""
    with sqlite3.connect(session) as database:
        key = "module_path, operator_name, occurrence, operator_args"
        rows = database.execute(f"SELECT job_id FROM mutation_specs ORDER BY {key}").fetchall()
        drawn = set(random.Random(seed).sample(rows, min(count, len(rows))))
        for table in ("mutation_specs", "work_items"):
            left_out = [row for row in rows if row not in drawn]
            database.executemany(f"DELETE FROM {table} WHERE job_id = ?", left_out)


def survivors(session: Path) -> list[tuple[str, str, str]]:
    """Return the module, operator and difference of each mutation that no case noticed."""
    with sqlite3.connect(session) as database:
        return database.execute(
            "SELECT module_path, operator_name, diff FROM mutation_specs JOIN work_results "
            "USING (job_id) WHERE test_outcome LIKE 'SURVIVED' ORDER BY module_path"
        ).fetchall()


def main() -> int:
    """Run a sample and print its survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, default=200, help="how many mutations")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a mutation")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for root in ROOTS:
            shutil.copytree(ROOT / root, Path(folder, root))
        Path(folder, "config.toml").write_text(configuration(arguments.timeout), encoding="utf-8")
        paths = [folder, *(str(Path(folder, root)) for root in ROOTS[1:])]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PDCORE_PLUGINS": ""}
        session = Path(folder, "session.sqlite")

        def run(command: str) -> None:
            words = [sys.executable, "-m", "cosmic_ray.cli", command, "config.toml", session.name]
            subprocess.run(words, cwd=folder, env=environment, check=True)

        # A mutation counts as noticed only where the suite passes without it.
        baseline = [sys.executable, "-m", "cosmic_ray.cli", "baseline", "config.toml"]
        subprocess.run(baseline, cwd=folder, env=environment, check=True)
        run("init")
        keep(session, arguments.sample, arguments.seed)
        run("exec")
        alive = survivors(session)
    for module, operator, difference in alive:
        print(f"--- survived: {operator} in {module}\n{difference}")
    print(f"{len(alive)} of {arguments.sample} mutations survived")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
