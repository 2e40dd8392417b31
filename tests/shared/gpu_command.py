"""The command for a machine with a GPU, run by its path in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from installing import VARIABLES

from pdcore_conformance.gpu.prepared import ROOT

SCRIPT = ROOT / "conformance" / "pdcore_conformance" / "gpu"
SOFTMAX = "kernels::kernel_is_computed[softmax-float32]"
GAUSSIAN = "kernels::kernel_is_computed[gaussian(gamma=0.3)-float32]"
COSINE = "kernels::kernel_is_computed[cosine-float32]"
CASES = [f"--case={name}" for name in (SOFTMAX, GAUSSIAN, COSINE)]


def variables(path: Path | None = None, **more: str) -> dict[str, str]:
    """Give the variables of a process that finds modules in a folder, and no checkout."""
    environment = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    environment["PYTHONPATH"] = str(path) if path else ""
    return environment | more


def command(
    folder: Path, *arguments: str, path: Path | None = None, device: str = "cpu", **more: str
) -> tuple[int, str]:
    """Run the command; give its exit code and what it prints."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--folder", str(folder), "--device", device, *arguments],
        env=variables(path, **more),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr
