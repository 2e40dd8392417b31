"""The rows of ``pdcore bench torch --table``."""

from __future__ import annotations

import pytest
from bench_rows import check_rows


@pytest.mark.parametrize(
    ("direction", "words"),
    [("forward", ("",)), ("forward+backward", ("sink", "alibi", "segments=4"))],
)
def test_every_row_is_measured_once_its_numbers_are_right(
    direction: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rows("torch", direction, words, monkeypatch)
