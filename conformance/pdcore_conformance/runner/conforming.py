"""The suite run from Python, as ``pdcore conform`` and the tests of the suite run it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from . import plugin
from .cases import SUITE, case_id

if TYPE_CHECKING:
    from ..record.writing import Run

__all__ = ["SuiteResult", "conform", "list_cases"]

SETTINGS = Path(__file__).parents[1] / "suite" / "pytest.ini"


class SuiteResult(NamedTuple):
    """The record of a run, and its exit code.

    Attributes
    ----------
    run : Run or None
        The record; None where pytest ended before a backend was loaded.
    code : int
        The exit code: one of `pdcore.errors.Exit`, or of pytest where pytest was interrupted or
        could not start.
    """

    run: Run | None
    code: int


class _Watcher:
    """A plugin of pytest that reports the share of cases done, and keeps the `Conformance`."""

    def __init__(self, say: Callable[[float], None]) -> None:
        self.say, self.done, self.total = say, 0, 0
        self.conformance: plugin.Conformance | None = None
        self.ids: list[str] = []
        self.errors: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)
        self.ids = [case_id(item) for item in session.items]
        self.conformance = session.config.pluginmanager.get_plugin(plugin.NAME)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.conformance = session.config.pluginmanager.get_plugin(plugin.NAME)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(report.longreprtext)

    def pytest_runtest_logfinish(self) -> None:
        self.done += 1
        self.say(self.done / max(self.total, 1))


def conform(
    backend: str,
    *,
    level: str = "all",
    grid: str = "quick",
    cases: Sequence[str] = (),
    report: str | Path | None = None,
    allow_missing: bool = False,
    collect_only: bool = False,
    say: Callable[[float], None] = lambda share: None,
    more: Sequence[object] = (),
) -> SuiteResult:
    """Run the suite in this process.

    Parameters
    ----------
    backend : str
        ``NAME`` or ``NAME:DEVICE``.
    level : {"core", "all"}
        ``core`` has the cases that every backend must pass, ``all`` also those of the features
        that the backend declares.
    grid : {"quick", "full"}
        ``full`` has more sizes, and four covering arrays of all axes in place of one.
    cases : sequence of str
        Ids of cases; all by default.
    report : path, optional
        The path of the record to write.
    allow_missing : bool
        Return the code 0 where the backend is not available on this machine.
    collect_only : bool
        Run no case; plugins see those that would run.
    say : callable
        Called with the share of the cases that have run.
    more : sequence of object
        Further plugins of pytest, such as one that limits the time.

    Returns
    -------
    SuiteResult

    Raises
    ------
    ValueError
        For an unknown backend, device or case.
    RuntimeError
        When the suite itself cannot be collected.
    """
    watcher = _Watcher(say)
    arguments = [f"--level={level}", f"--grid={grid}", *(f"--case={name}" for name in cases)]
    if report is not None:
        arguments.append(f"--report={report}")
    if allow_missing:
        arguments.append("--allow-missing")
    if collect_only:
        arguments.append("--collect-only")
    code = _pytest(backend, arguments, watcher, *more, modules=_modules(cases))
    if watcher.errors:
        raise RuntimeError("the suite cannot be collected:\n" + "\n".join(watcher.errors))
    conformance = watcher.conformance
    if conformance is not None and conformance.refused:
        raise ValueError(conformance.refused)
    return SuiteResult(None if conformance is None else conformance.run, code)


def list_cases(backend: str, *, level: str = "all", grid: str = "quick") -> list[str]:
    """List the ids of the cases that a run would have, in their order."""
    watcher = _Watcher(lambda share: None)
    _pytest(backend, [f"--level={level}", f"--grid={grid}", "--collect-only"], watcher)
    return watcher.ids


def _modules(cases: Sequence[str]) -> list[str]:
    """Return the modules of these cases; the whole suite where an id has no module."""
    names = sorted({f"test_{case.partition('::')[0]}" for case in cases})
    if not names or not {path.stem for path in SETTINGS.parent.glob("test_*.py")}.issuperset(names):
        return [SUITE]
    return [f"{SUITE}.{name}" for name in names]


def _pytest(
    backend: str,
    arguments: list[str],
    watcher: _Watcher,
    *more: object,
    modules: Sequence[str] = (SUITE,),
) -> int:
    plugin.parse_backend(backend)
    # Neither installed plugins of pytest, nor a conftest.py of the folder that the command runs
    # in, may change the outcome.
    before = os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        return int(
            pytest.main(
                [
                    "-c",
                    str(SETTINGS),
                    "-p",
                    plugin.__name__,
                    "-p",
                    "no:terminal",
                    "-p",
                    "no:cacheprovider",
                    "--noconftest",
                    "--pyargs",
                    *modules,
                    f"--backend={backend}",
                    *arguments,
                ],
                plugins=[watcher, *more],
            )
        )
    finally:
        if before is None:
            del os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
        else:
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = before
