"""The process that judges a backend for `pdcore_conformance.runner.watching`.

It writes a journal, one JSON object a line, flushed at once: the cases that are planned, each case
as it begins and as it ends, and the end of the run. So whatever ends the process, the journal says
how far it came.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from . import conforming, plugin
from .cases import about, case_id

if TYPE_CHECKING:
    from ..frameworks.base import Framework
    from ..record.writing import Case, Run

__all__ = ["LOST", "JournalFile"]

#: The exit code of a child whose device computes nothing more.
LOST = 70


class JournalFile:
    """A plugin of pytest that writes the journal."""

    def __init__(self, path: str) -> None:
        # Open until the process ends, which a crash does too.
        self.stream = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.run: Run | None = None
        self.conformance: Any = None

    def write(self, **entry: Any) -> None:
        """Write a line; numbers of NumPy are written as Python's."""
        self.stream.write(json.dumps(entry, default=lambda number: number.item()) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write the cases that are planned."""
        self.conformance = session.config.pluginmanager.get_plugin(plugin.NAME)
        planned = [about(item) for item in session.items]
        self.write(run=self.conformance.run, planned=planned)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Write that a case begins."""
        self.write(began=case_id(item), printed=os.fstat(sys.stdout.fileno()).st_size)

    def pytest_runtest_logfinish(self) -> None:
        """Write how a case has ended, and end with it where the device is lost."""
        case = next(reversed(self.conformance.cases.values()))
        self.write(done=case)
        subject = self.conformance.under_test
        if subject is not None:
            self.end_where_lost(case, subject.framework, subject.device)

    def end_where_lost(self, case: Case, library: Framework, device: str) -> None:
        """End the process after a case that failed, where its device computes nothing more.

        All cases after it would fail, too.
        """
        if case["outcome"] in ("failed", "error") and (lost := library.broken(device)):
            self.write(lost=lost)
            os._exit(LOST)


def main(path: str, options: dict[str, Any]) -> None:
    """Run the suite, and write the journal."""
    # A crash loses what is not flushed.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # Ctrl-C is for the parent, which ends this process; a KeyboardInterrupt here is the backend's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    journal = JournalFile(path)
    try:
        run, code = conforming.conform(**options, more=[journal])
    except ValueError as error:
        journal.write(refused=str(error))
    else:
        journal.write(run=run, code=code)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
