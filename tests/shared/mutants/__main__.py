"""Run the case that must fail on every mutant, and write the table of docs/mutants.md.

``--whole`` also runs the quick suite on each, which takes about a minute each, and prints how many
cases fail.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .registry import PARENT

ROOT = Path(__file__).resolve().parents[3]
TABLE = ROOT / "docs" / "mutants.md"

#: A script that runs some mutants and prints, for each, the cases that did not pass.
RUN = """
import json, sys
sys.path.insert(0, {tests!r})
import mutants
from pdcore_conformance.runner.conforming import conform
mutants.register()
results = {{}}
for name, cases in {runs!r}:
    run, code = conform(name, cases=cases)
    results[name] = {{
        "ran": len(run["cases"]),
        "bad": {{c["id"]: [c["ratio"], c["message"]] for c in run["cases"]
                 if c["outcome"] in ("failed", "error")}},
    }}
print(json.dumps(results))
"""


def run(runs: list[tuple[str, list[str]]]) -> dict[str, dict]:
    """Run the suite on some backends, each with some cases, or all cases for an empty list."""
    script = RUN.format(tests=str(ROOT / "tests" / "shared"), runs=runs)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PDCORE_PLUGINS": "",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write(results: dict[str, dict]) -> None:
    """Write docs/mutants.md."""
    from .registry import MUTANTS

    lines = [
        "# Planted defects",
        "",
        f"The suite is tested too. {len(MUTANTS)} backends are right except for one planted defect",
        "each, and each is caught by a case whose name describes the defect. `nox -s mutants`",
        "writes this table; `tests/conformance/test_mutants.py` runs the same cases in every",
        "test run, and checks that they pass on the backend without a defect. *error / budget*",
        "is the error of the case divided by its budget, so 1 is the limit: *inf* for a NaN or",
        "an infinity in a wrong place, empty where the defect is not a wrong number.",
        "",
        "Backends that end or block their process are in `tests/conformance/test_watching.py`:",
        "`os._exit(0)`, a segmentation fault, an abort, a call that never returns; each is a",
        "failure of the case in which it happens.",
        "",
        "| mutant | defect | case that fails | error / budget |",
        "|---|---|---|---|",
    ]
    for name, mutant in MUTANTS.items():
        bad = results[f"mutant_{name}"]["bad"]
        ratio = bad[mutant.case][0]
        text = "" if ratio is None else "inf" if ratio in ("inf", float("inf")) else f"{ratio:.3g}"
        sentence = " ".join((mutant.cls.__doc__ or "").split())
        case = mutant.case.replace("|", "\\|")
        lines.append(f"| {name} | {sentence} | `{case}` | {text} |")
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run the mutants and write the table; exit with a message where a mutant is not caught."""
    from .registry import MUTANTS, register

    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--whole", action="store_true", help="count all failing cases too")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    arguments = parser.parse_args()
    register()
    results = run([(f"mutant_{name}", [mutant.case]) for name, mutant in MUTANTS.items()])
    missed = [n for n, m in MUTANTS.items() if m.case not in results[f"mutant_{n}"]["bad"]]
    if missed:
        sys.exit(f"not caught by their cases: {', '.join(missed)}")
    write(results)
    parent = run([(PARENT, sorted({mutant.case for mutant in MUTANTS.values()}))])[PARENT]
    if parent["bad"]:
        sys.exit(f"the backend without a defect fails: {parent['bad']}")
    if arguments.whole:

        def count(name: str) -> str:
            result = run([(f"mutant_{name}", [])])[f"mutant_{name}"]
            return f"{name}: {len(result['bad'])} of {result['ran']} cases fail"

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for line in pool.map(count, MUTANTS):
                print(line, flush=True)


if __name__ == "__main__":
    main()
