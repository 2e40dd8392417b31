"""The one command for a GPU machine, run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from installing import VARIABLES

from pdcore_conformance.record import writing as record

SOFTMAX = "kernels::kernel_is_computed[softmax-float32]"
GAUSSIAN = "kernels::kernel_is_computed[gaussian(gamma=0.3)-float32]"
BIAS = "refusals::feature[bias]"
CASES = [f"--case={name}" for name in (SOFTMAX, GAUSSIAN, BIAS)]


def command(
    out: Path, *arguments: str, path: Path | None = None, device: str = "cpu", **more: str
) -> tuple[int, str]:
    """Run the command; give its exit code and what it prints."""
    environment = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    roots = [str(Path(x).resolve()) for x in sys.path if x]
    environment["PYTHONPATH"] = os.pathsep.join([str(path), *roots] if path else roots)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pdcore_conformance.gpu",
            "--out",
            str(out),
            "--device",
            device,
            *arguments,
        ],
        env=environment | more,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def runs_of(path: Path) -> dict[str, Any]:
    return {record.target(run): run for run in record.load(path)["runs"]}
