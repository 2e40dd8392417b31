"""The suite in a process of its own, so that a backend that ends or blocks it fails."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..record import writing as record
from . import child, plugin
from .conforming import SuiteResult
from .outcomes import new_case

if TYPE_CHECKING:
    from ..record.writing import Case, ProcessEnd, Run

__all__ = ["LIMIT", "Journal", "WatchedProcess", "conform_watched"]

#: The most seconds for a case, by default: a compiler may need minutes. Also for what comes before
#: the first case, whatever the limit.
LIMIT = 300.0
#: Seconds between two looks at the journal.
PACE = 0.05
#: Seconds to end in, for a process that has written all of its journal or is asked to end.
GRACE = 10.0
#: The most characters that are kept of the start, and of the end, of what a case printed.
LOG = 2000


def conform_watched(
    backend: str,
    *,
    limit: float = LIMIT,
    report: str | Path | None = None,
    allow_missing: bool = False,
    say: Callable[[float], None] = lambda share: None,
    **options: Any,
) -> SuiteResult:
    """Run the suite in a child process, and record how the child ends.

    Where it ends before its time, or a case takes longer than the limit, that case has failed, and
    the cases after it are errors, because they did not run.

    Parameters
    ----------
    backend, report, allow_missing, say
        As for `pdcore_conformance.runner.conform`.
    limit : float
        The most seconds for a case.
    **options
        `level`, `grid` and `cases`, as for `pdcore_conformance.runner.conform`.

    Returns
    -------
    SuiteResult

    Raises
    ------
    ValueError
        For an unknown backend, device or case.
    RuntimeError
        When the child ends before it has collected the cases; the message has what it printed.
    """
    plugin.parse_backend(backend)
    options |= {"backend": backend, "allow_missing": allow_missing}
    with WatchedProcess(child.__name__, options) as process:
        journal = process.journal

        def heard(entry: dict[str, Any]) -> None:
            say(len(journal.cases) / max(len(journal.planned), 1))

        process.wait(limit, heard)
        process.stop()
        journal.read()
        how, printed = process.how(), process.printed()
    if journal.refused is not None:
        raise ValueError(journal.refused)
    if journal.run is None:
        raise RuntimeError(f"the suite did not start: {how}; it printed:\n{printed}")
    run, code = journal.run, journal.code
    if code is None:
        run["ended"] = {"how": how, "case": journal.current, "log": printed}
    _complete(run, journal, how if code is None else f"pytest's exit code {code}")
    if report is not None:
        record.save(Path(report), [run], replace=True)
    # A code of pytest's own, such as that of an error in pytest, is no success.
    return SuiteResult(run, plugin.exit_code(run, allow_missing) or int(bool(code)))


class Journal:
    """What a child has written so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: Run | None = None
        self.planned: list[dict[str, Any]] = []
        self.cases: dict[str, Case] = {}
        self.current: str | None = None
        self.refused: str | None = None
        self.lost: str | None = None
        self.code: int | None = None
        #: The size of the log when the last case began.
        self.printed = 0
        self._read = 0

    @property
    def whole(self) -> bool:
        """Whether the child has nothing more to write."""
        return self.code is not None or self.refused is not None

    def patience(self, limit: float) -> float:
        """Return the most seconds until the next line, for this limit of a case."""
        if self.whole:
            return GRACE
        return limit if self.current is not None else max(limit, LIMIT)

    def read(self) -> list[dict[str, Any]]:
        """Read and return the entries that are new."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self._read)
            # By one call: the child may write the rest of a line after its start was read.
            written = stream.read()
        whole = written[: written.rfind(b"\n") + 1]
        self._read += len(whole)
        entries = [json.loads(line) for line in whole.splitlines()]
        for entry in entries:
            self._take(entry)
        return entries

    def _take(self, entry: dict[str, Any]) -> None:
        self.run = entry.get("run", self.run)
        self.planned = entry.get("planned", self.planned)
        self.current = entry.get("began")
        self.printed = entry.get("printed", self.printed)
        self.refused = entry.get("refused")
        self.lost = entry.get("lost")
        self.code = entry.get("code")
        if "done" in entry:
            self.cases[entry["done"]["id"]] = entry["done"]


class WatchedProcess:
    """A child process that writes a journal, in a group of its own, which Ctrl-C does not reach.

    Parameters
    ----------
    module : str
        What the child runs, with the paths of the journal and of the options as arguments.
    options : dict
        For the child, as JSON.
    environment : mapping of str to str, optional
        Its variables; those of this process by default.

    Attributes
    ----------
    journal : Journal
        What it has written so far.
    late : bool
        Whether it was ended because a case took too long.
    """

    def __init__(
        self, module: str, options: dict[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        self._folder = TemporaryDirectory(prefix="pdcore-")
        self.journal = Journal(Path(self._folder.name, "journal"))
        self._log = Path(self._folder.name, "log")
        self.late, self._limit = False, LIMIT
        variables = {
            **(os.environ if environment is None else environment),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        # A library that ends the process prints why: pytest would capture it.
        addopts = variables.get("PYTEST_ADDOPTS", "")
        variables["PYTEST_ADDOPTS"] = f"{addopts} --capture=no".strip()
        # In a file, as the names of cases may exceed what a command line holds.
        asked = Path(self._folder.name, "options.json")
        asked.write_text(json.dumps(options), encoding="utf-8")
        command = [sys.executable, "-P", "-X", "faulthandler", *(f"-W{w}" for w in sys.warnoptions)]
        with self._log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, "-m", module, str(self.journal.path), str(asked)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )

    def __enter__(self) -> WatchedProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._folder.cleanup()

    def wait(
        self,
        limit: float,
        heard: Callable[[dict[str, Any]], None] = lambda entry: None,
        until: float = math.inf,
    ) -> None:
        """Wait for the end of the child, and end it where a case takes too long.

        Parameters
        ----------
        limit : float
            The most seconds for a case.
        heard : callable
            Called with each entry of the journal.
        until : float
            The value of `time.monotonic` at which not to wait any longer.
        """
        last = time.monotonic()
        while self.process.poll() is None and time.monotonic() < until:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(PACE)
            entries = self.journal.read()
            for entry in entries:
                heard(entry)
            if entries:
                last = time.monotonic()
            elif time.monotonic() - last > self.journal.patience(limit):
                # The handler of faulthandler prints where every thread is.
                self.process.send_signal(signal.SIGABRT)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(GRACE)
                self.late = not self.journal.whole
                self._limit = limit
                break
        for entry in self.journal.read():
            heard(entry)

    def stop(self, grace: float = GRACE) -> None:
        """End the child, where it still runs, and the processes that it has started."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def how(self) -> str:
        """Return how the child has ended."""
        if self.journal.lost is not None:
            return f"the device computes nothing more: {self.journal.lost}"
        return f"no end after {self._limit:g} s" if self.late else _end(self.process.returncode)

    def printed(self) -> str:
        """Return what the child has printed since the last case began, shortened."""
        return _shortened(self._log.read_bytes()[self.journal.printed :])


def _shortened(printed: bytes) -> str:
    """Return the start, with the innermost calls of a crash, and the end of what was printed."""
    text = printed.decode(errors="replace").strip()
    return text if len(text) <= 2 * LOG else f"{text[:LOG]}\n[...]\n{text[-LOG:]}"


def _end(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _complete(run: Run, journal: Journal, how: str) -> None:
    """Record the case in which the child ended as failed, and cases that did not run as errors."""
    cases = {case["id"]: case for case in run["cases"]} or journal.cases
    end: ProcessEnd | None = run.get("ended")
    for about in journal.planned:
        name = about["id"]
        if name in cases:
            continue
        if end is not None and name == end["case"]:
            cases[name] = new_case(**about, outcome="failed", message=f"the process ended: {how}")
        else:
            where = f" in {end['case']}" if end is not None and end["case"] else ""
            message = f"did not run: the process ended before{where}: {how}"
            cases[name] = new_case(**about, outcome="error", message=message)
    run["cases"] = [cases[name] for name in sorted(cases)]
    run["counts"] = {o: sum(c["outcome"] == o for c in run["cases"]) for o in record.OUTCOMES}
    run["seconds"] = run["seconds"] or sum(case["seconds"] for case in run["cases"])
