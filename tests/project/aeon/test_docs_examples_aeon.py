"""The examples of the pages that need aeon."""

from __future__ import annotations

import pytest
from page_examples import pages, run_page


@pytest.mark.parametrize("page", pages("aeon"))
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, "aeon")
