"""The command for a machine with a GPU, on JAX."""

from __future__ import annotations

from pathlib import Path

import jax  # noqa: F401 - the command needs it
from gpu_command import SOFTMAX, command

from pdcore.errors import Exit
from pdcore_conformance.record import writing as record


def test_the_command(tmp_path: Path) -> None:
    arguments = ("--only=jax", "--stages=machine,suite", "--minutes=30", f"--case={SOFTMAX}")
    code, text = command(tmp_path / "records", *arguments)
    assert code == Exit.DONE, text
    [run] = record.load(tmp_path / "records" / "record.json")["runs"]
    assert run["counts"]["passed"] == 1
    assert "jax" in run["versions"]
