"""The parts of `nox -s nightly` depend on files that there are, and run sessions that there are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def nightly():
    spec = importlib.util.spec_from_file_location("nightly_parts", ROOT / ".ci" / "nightly.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_name_files_and_sessions(nightly):
    sessions = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    for name, part in nightly.PARTS.items():
        assert all((ROOT / path).exists() for path in part.depends), name
        for word in part.nox[1:]:
            if word == "--":
                break
            assert word.partition("(")[0] in sessions, name


def test_what_is_stale_runs_longest_ago_first_as_time_allows(nightly, monkeypatch, capsys):
    parts = {n: nightly.Part(("-s", n), (n,), m) for n, m in (("a", 1), ("b", 9), ("c", 2))}
    parts["d"] = nightly.Part(("-s", "d"), ("d",), 1)
    ran = []
    monkeypatch.setattr(nightly, "PARTS", parts)
    monkeypatch.setattr(nightly, "hashes", lambda part: {part.nox[1]: "new"})
    monkeypatch.setattr(nightly, "passes", lambda part: ran.append(part.nox[1]) or True)
    notes = {
        "a": {"date": "2026-02-01", "passed on": {"a": "old"}},
        "c": {"date": "2026-01-01", "passed on": {"c": "old"}},
        "d": {"date": "2026-01-01", "passed on": {"d": "new"}},
    }
    assert nightly.run_stale(5, notes) == 0
    assert ran == ["c", "a"]
    said = capsys.readouterr().out
    assert "LEFT OUT, though its files have changed since it passed: b (9 min)" in said
    monkeypatch.setattr(nightly, "passes", lambda part: False)
    assert nightly.run_stale(5, notes) == 1
