"""A plugin of pytest that writes which cases of the suite run which lines of a folder.

The variable CASE_LINES has the folder and the file to write: {path: {line: [id of a case]}}. Lines
that run at an import alone are not in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

from pdcore_conformance.runner.cases import case_id

FOLDER, FILE = os.environ["CASE_LINES"].split(os.pathsep)
LINES = coverage.Coverage(data_file=None, source=[FOLDER], config_file=False)


def pytest_collection_finish() -> None:
    """Begin when the modules are imported."""
    LINES.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note the lines of a case under its id."""
    LINES.switch_context(case_id(item))
    try:
        return (yield)
    finally:
        LINES.switch_context("")


def pytest_sessionfinish() -> None:
    """Write the lines."""
    LINES.stop()
    data = LINES.get_data()
    lines = {
        os.path.relpath(path): {
            line: [name for name in names if name]
            for line, names in data.contexts_by_lineno(path).items()
        }
        for path in data.measured_files()
    }
    Path(FILE).write_text(json.dumps(lines), encoding="utf-8")
