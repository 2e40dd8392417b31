"""Test the example that trains on sequences which are cut over processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from example_modules import example

command = example("train_long_sequences")
SMALL = ["--length", "16", "--batch", "4", "--steps", "3", "--double"]


def test_two_processes_have_the_losses_of_one(
    tmp_path: Path,
) -> None:
    one, two, picture = (tmp_path / name for name in ("one.json", "two.json", "curves.png"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    files = ["--out", str(two), "--png", str(picture), str(one)]
    single = subprocess.run(
        [sys.executable, command.__file__, *SMALL, "--out", str(one)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert single.returncode == 0, single.stderr
    assert single.stdout.startswith("1 process: loss ")
    done = subprocess.run(
        [*launcher, command.__file__, *SMALL, *files], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "largest distance from 1 process" in done.stdout
    losses = [json.loads(path.read_text())["losses"] for path in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert picture.read_bytes().startswith(b"\x89PNG")
