"""Run the suite on every mutant, and write the table of docs/mutants.md.

``python -m tests.mutants`` runs the whole quick suite on each, which takes about a minute for
one; ``--telling`` runs the telling cases alone, and keeps the counts of the table that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .registry import PARENT

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "mutants.md"

#: Runs some mutants in one interpreter; prints, for each, its cases that did not pass.
RUN = """
import json, sys
sys.path.insert(0, {tests!r})
import mutants
from pdcore_conformance.running import conform
mutants.register()
found = {{}}
for name, cases in {runs!r}:
    run, code = conform(name, cases=cases)
    found[name] = {{
        "ran": len(run["cases"]),
        "bad": {{c["id"]: [c["ratio"], c["message"]] for c in run["cases"]
                 if c["outcome"] in ("failed", "error")}},
    }}
print(json.dumps(found))
"""


def run(runs: list[tuple[str, list[str]]]) -> dict[str, dict]:
    """Run the suite on some backends, each with its cases, or all of them for none."""
    script = RUN.format(tests=str(ROOT / "tests"), runs=runs)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], check=False, capture_output=True, text=True,
        env=os.environ | {
            "PDCORE_PLUGINS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def known_counts() -> dict[str, str]:
    """Read the counts of the table that is there."""
    if not TABLE.exists():
        return {}
    return dict(re.findall(r"^\| (\w+) \|.*\| ([^|]+) \|$", TABLE.read_text(), re.MULTILINE))


def write(results: dict[str, dict], counts: dict[str, str]) -> None:
    """Write the table."""
    from .registry import MUTANTS

    lines = [
        "# Planted defects",
        "",
        f"The suite is tested too. {len(MUTANTS)} backends are right but for one planted defect each,",
        "and each is caught by a case whose name tells what is wrong. `nox -s mutants` runs the whole",
        "quick suite on all of them and writes this table; `tests/test_mutants.py` runs the telling",
        "cases in every test run. *error / budget* is the error of the telling case over what it is",
        "allowed (1 is the limit): *inf* for a NaN or an infinity in a wrong place, empty where the",
        "defect is not one of numbers. The last column counts the cases of the suite that fail.",
        "",
        "| mutant | what is wrong | telling case | error / budget | failing |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, mutant in MUTANTS.items():
        bad = results[f"mutant_{name}"]["bad"]
        ratio = bad[mutant.case][0]
        text = "" if ratio is None else "inf" if ratio in ("inf", float("inf")) else f"{ratio:.3g}"
        sentence = " ".join((mutant.cls.__doc__ or "").split())
        case = mutant.case.replace("|", "\\|")
        lines.append(f"| {name} | {sentence} | `{case}` | {text} | {counts.get(name, '')} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run, and write."""
    from .registry import MUTANTS, register

    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--telling", action="store_true", help="only the telling cases")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    arguments = parser.parse_args()
    register()
    results = run([(f"mutant_{name}", [mutant.case]) for name, mutant in MUTANTS.items()])
    missed = [n for n, m in MUTANTS.items() if m.case not in results[f"mutant_{n}"]["bad"]]
    if missed:
        sys.exit(f"not caught by their telling cases: {', '.join(missed)}")
    counts = known_counts()
    if not arguments.telling:

        def count(name: str) -> tuple[str, str]:
            found = run([(f"mutant_{name}", [])])[f"mutant_{name}"]
            print(name, len(found["bad"]), "of", found["ran"], flush=True)
            return name, f"{len(found['bad'])} of {found['ran']}"

        with ThreadPoolExecutor(arguments.jobs) as pool:
            counts |= dict(pool.map(count, MUTANTS))
    write(results, counts)
    parent = run([(PARENT, sorted({mutant.case for mutant in MUTANTS.values()}))])[PARENT]
    if parent["bad"]:
        sys.exit(f"the backend without a defect fails: {parent['bad']}")


if __name__ == "__main__":
    main()
