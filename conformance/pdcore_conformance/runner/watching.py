"""The suite in a process of its own, so that a backend that ends or blocks it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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

__all__ = ["LIMIT", "conform_watched"]

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
    with TemporaryDirectory(prefix="pdcore-conform-") as folder:
        journal = _Journal(Path(folder, "journal"))
        log = Path(folder, "log")
        options |= {"backend": backend, "allow_missing": allow_missing}
        process = _start(journal.path, log, options)
        try:
            late = _wait(process, journal, limit, say)
        finally:
            _stop(process)
        journal.read()
        printed = _shortened(log.read_bytes()[journal.printed :])
    if journal.refused is not None:
        raise ValueError(journal.refused)
    how = f"no end after {limit:g} s" if late else _end(process.returncode)
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


def _start(journal: Path, log: Path, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the child in a group of its own, which Ctrl-C does not reach."""
    command = [sys.executable, "-P", "-X", "faulthandler", *(f"-W{w}" for w in sys.warnoptions)]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        # A library that ends the process prints why: pytest would capture it.
        "PYTEST_ADDOPTS": f"{os.environ.get('PYTEST_ADDOPTS', '')} --capture=no".strip(),
    }
    # In a file, as the names of cases may exceed what a command line holds.
    asked = journal.with_name("options.json")
    asked.write_text(json.dumps(options), encoding="utf-8")
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*command, "-m", child.__name__, str(journal), str(asked)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )


class _Journal:
    """What the child has written so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: Run | None = None
        self.planned: list[dict[str, Any]] = []
        self.cases: dict[str, Case] = {}
        self.current: str | None = None
        self.refused: str | None = None
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

    def read(self) -> bool:
        """Read the lines that are new, and return whether there is one."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as stream:
            stream.seek(self._read)
            lines = [line for line in stream if line.endswith(b"\n")]
        self._read += sum(map(len, lines))
        for line in lines:
            self._take(json.loads(line))
        return bool(lines)

    def _take(self, entry: dict[str, Any]) -> None:
        self.run = entry.get("run", self.run)
        self.planned = entry.get("planned", self.planned)
        self.current = entry.get("began")
        self.printed = entry.get("printed", self.printed)
        self.refused = entry.get("refused")
        self.code = entry.get("code")
        if "done" in entry:
            self.cases[entry["done"]["id"]] = entry["done"]


def _wait(
    process: subprocess.Popen[bytes],
    journal: _Journal,
    limit: float,
    say: Callable[[float], None],
) -> bool:
    """Wait for the end of the child, and return whether it was ended because it took too long."""
    heard = time.monotonic()
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(PACE)
        if journal.read():
            heard = time.monotonic()
            say(len(journal.cases) / max(len(journal.planned), 1))
        elif time.monotonic() - heard > journal.patience(limit):
            # The handler of faulthandler prints where every thread is.
            process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return not journal.whole
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the child, where it still runs, and the processes that it has started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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


def _complete(run: Run, journal: _Journal, how: str) -> None:
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
