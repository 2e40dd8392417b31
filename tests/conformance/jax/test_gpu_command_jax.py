"""The one command for a GPU machine, on JAX."""

from __future__ import annotations

from pathlib import Path

import jax  # noqa: F401 - the command needs it
from gpu_command import CASES, command, runs_of

from pdcore.errors import Exit


def test_the_command(tmp_path: Path) -> None:
    name = "jax"
    code, text = command(tmp_path / "records", "--only", name, "--no-speed", *CASES)
    assert code == Exit.DONE, text
    run = runs_of(tmp_path / "records" / "record.json")[f"{name}:cpu"]
    assert run["counts"]["passed"] == 3
    assert name in run["versions"]
