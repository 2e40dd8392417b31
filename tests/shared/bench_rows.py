"""A check of the rows of ``pdcore bench --table``, for tests in several environments."""

from __future__ import annotations

import pytest

from pdcore_conformance.bench import measurements, rows, speed

__all__ = ["SMALL", "check_rows"]

SMALL = (1, 4, 32, 8)


def check_rows(
    backend: str, direction: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that every row whose name has one of the words is measured."""
    monkeypatch.setattr(measurements, "SECONDS", 0.0)
    chosen = [
        (row, workload)
        for row, workload in rows.choose(backend, shape=SMALL, direction=direction)
        if any(word in row.name for word in words)
    ]
    measured = speed.measure(
        backend, grid="table", peers=["torch SDPA"], listed=lambda b: rows.steps(b, chosen)
    )
    assert not measured["red"], measured["numerics"]
    absent = {entry["peer"] for entry in measured["missing_peers"]}
    expected = {
        (row.name, workload.direction)
        for row, workload in chosen
        if not set(row.by) <= absent | {"textbook NumPy"}
    }
    assert {(entry["spec"], entry["direction"]) for entry in measured["ratios"]} >= expected
