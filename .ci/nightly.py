"""Run what is too long for `.ci/run`, and note in .ci/nightly.json on which files it passed.

`python .ci/nightly.py` runs every part, `python .ci/nightly.py gate browser` those two. A part that
passes is noted with the git hashes of the folders that it depends on. `--stale MINUTES` is what
`.ci/run` calls: it runs the parts whose folders have other hashes by now, those first that passed
longest ago, as far as the minutes go, says which it left out, and notes nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILE = Path(__file__).with_name("nightly.json")


class Part(NamedTuple):
    """What nox runs, the files that it depends on, and the minutes of two idle cores it takes."""

    nox: tuple[str, ...]
    depends: tuple[str, ...]
    minutes: float


SUITE = ("conformance/pdcore_conformance/suite", "conformance/pdcore_conformance/judge")
CUPY = "backends/pdcore_backends/cupy"
NEWER_JAX = ("constraints/jax.txt", "constraints/numpy.txt")
PARTS = {
    "grids": Part(
        ("-s", "tests"),
        ("pdcore/spec", "pdcore/reference", "pdcore/lowering", "pdcore/backend"),
        15,
    ),
    "frameworks": Part(
        ("-s", "tests_torch", "tests_jax", "tests_jax_adapters"),
        ("pdcore/backend", "adapters", "examples", "tests/backend", "tests/adapters"),
        25,
    ),
    "aeon": Part(
        ("-s", "tests_aeon"),
        (
            "adapters/pdcore_adapters/aeon.py",
            "adapters/pdcore_adapters/time_series",
            "tests/adapters/aeon",
            "tests/examples/aeon",
            "constraints/aeon.txt",
        ),
        4,
    ),
    "pythons": Part(("-s", "tests_pythons"), ("pyproject.toml", "constraints"), 20),
    "conform-numpy": Part(
        ("-s", "conform(numpy)", "conform(strict)"),
        ("backends/pdcore_backends/numpy", "backends/pdcore_backends/strict", *SUITE),
        8,
    ),
    "mutation": Part(
        ("-s", "mutation"), ("pdcore/backend", "backends/pdcore_backends/numpy", *SUITE), 90
    ),
    "conform-torch": Part(("-s", "conform(torch)"), ("backends/pdcore_backends/torch", *SUITE), 8),
    "conform-jax": Part(("-s", "conform(jax)"), ("backends/pdcore_backends/jax", *SUITE), 25),
    "conform-cuda": Part(
        ("-s", "conform_emulated"),
        (CUPY, "tests/cuda_cpu", "tests/cuda/emulated_cupy.py", *SUITE),
        25,
    ),
    "peers": Part(
        ("-s", "peers"),
        ("conformance/pdcore_conformance/peer_backends", "constraints/peers.txt"),
        8,
    ),
    "jax-newer": Part(
        ("-s", "tests_jax_newer"),
        ("backends/pdcore_backends/jax", "tests/backends/jax", *NEWER_JAX),
        8,
    ),
    "emulator": Part(("-s", "tests_emulator"), ("tests/cuda_cpu", "tests/emulator"), 2),
    "cuda": Part(("-s", "tests_cuda"), (CUPY, "tests/cuda"), 20),
    "processes": Part(
        ("-s", "tests", "--", "tests/conformance"),
        ("conformance/pdcore_conformance/gpu", "tests/conformance"),
        8,
    ),
    "gate": Part(("-s", "tests_cuda", "--", "tests/cuda/test_cuda_gate.py"), (CUPY,), 5),
    "browser": Part(
        ("-s", "tests_browser"),
        ("conformance/pdcore_conformance/report", "tests/conformance/browser"),
        3,
    ),
}


def hashes(part: Part) -> dict[str, str]:
    """Return the git hash of each file or folder that the part depends on."""
    command = ["git", "rev-parse", *(f"HEAD:{path}" for path in part.depends)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(zip(part.depends, done.stdout.split(), strict=True))


def changed(part: Part) -> bool:
    """Tell whether files that the part depends on differ from the commit."""
    command = ["git", "status", "--porcelain", "--", *part.depends]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return bool(done.stdout.strip())


def passes(part: Part) -> bool:
    """Run the part, all of it."""
    command = [sys.executable, "-m", "nox", *part.nox]
    environment = {**os.environ, "PDCORE_TESTS": "nightly"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def stale(notes: dict[str, Any]) -> list[str]:
    """Return the parts that have not passed on the files of this commit, longest ago first."""
    names = [n for n, part in PARTS.items() if notes.get(n, {}).get("passed on") != hashes(part)]
    return sorted(names, key=lambda name: notes.get(name, {}).get("date", ""))


def run_stale(minutes: float, notes: dict[str, Any]) -> int:
    """Run the stale parts that the minutes allow; return 1 if one fails."""
    left_out, failed = [], []
    for name in stale(notes):
        needed = notes.get(name, {}).get("minutes", PARTS[name].minutes)
        if needed > minutes:
            left_out.append(f"{name} ({needed:.0f} min)")
            continue
        began = time.monotonic()
        if not passes(PARTS[name]):
            failed.append(name)
        minutes -= (time.monotonic() - began) / 60
    if left_out:
        print("=" * 100)
        print(f"LEFT OUT, though its files have changed since it passed: {', '.join(left_out)}.")
        print(f"{max(minutes, 0):.0f} minutes were left. `nox -s nightly` runs and notes them.")
        print("=" * 100)
    print(f"nightly parts that failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


def run_all(names: list[str], notes: dict[str, Any]) -> int:
    """Run these parts and note those that pass; return 1 if one fails."""
    failed = []
    for name in names:
        part, began = PARTS[name], time.monotonic()
        if changed(part):
            sys.exit(f"{name}: commit its files first, or its note would be of other ones")
        if not passes(part):
            failed.append(name)
            continue
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        minutes = round((time.monotonic() - began) / 60, 1)
        notes[name] = {"date": today, "minutes": minutes, "passed on": hashes(part)}
        FILE.write_text(json.dumps(notes, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"failed: {', '.join(failed) or 'none'}; {FILE.name} notes the others: commit it")
    return 1 if failed else 0


def main() -> int:
    """Run the parts that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--stale", type=float, metavar="MINUTES", help="those that have changed")
    parser.add_argument("--list", action="store_true", help="print the parts that have changed")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    notes = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if arguments.list:
        print("\n".join(stale(notes)))
        return 0
    if arguments.stale is not None:
        return run_stale(arguments.stale, notes)
    return run_all(arguments.parts or list(PARTS), notes)


if __name__ == "__main__":
    sys.exit(main())
