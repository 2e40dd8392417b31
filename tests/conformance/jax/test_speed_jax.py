"""The rows of ``pdcore bench jax --table``."""

from __future__ import annotations

import pytest
from bench_rows import check_rows


def test_every_row_is_measured_once_its_numbers_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows("jax", "forward+backward", ("segments=4",), monkeypatch)
