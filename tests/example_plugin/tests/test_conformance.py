"""The backend computes what the specification says, and refuses the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_conformance(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, "-m", "pdcore", "conform", "numba", "--report", str(record)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = json.loads(record.read_text())["runs"]
    assert run["counts"]["passed"] > 2000
