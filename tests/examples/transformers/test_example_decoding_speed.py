"""Test the example that measures a step of decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_modules import example

command = example("decoding_speed")


def test_it_prints_a_table_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "steps.png"
    arguments = ["--past", "16", "32", "--steps", "2", "--png", str(picture)]
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| past | DynamicCache + SDPA | softmax | bn(statistics=prefix) | linear |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 16", "| 32"]
    assert picture.read_bytes().startswith(b"\x89PNG")
