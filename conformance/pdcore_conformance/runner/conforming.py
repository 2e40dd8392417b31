"""The suite run from Python: what ``pdcore conform`` and the tests of the suite call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from . import plugin

if TYPE_CHECKING:
    from ..record.writing import Run

__all__ = ["Outcome", "conform", "list_cases"]

SETTINGS = Path(__file__).parents[1] / "suite" / "pytest.ini"


class Outcome(NamedTuple):
    """How a run ended.

    Attributes
    ----------
    run : Run or None
        None where pytest did not get as far as a backend.
    code : int
        The exit code: `pdcore.cli.Exit`, or pytest's own where it was interrupted or could not
        start.
    """

    run: Run | None
    code: int


class _Watcher:
    """Tells how far a run has come, and keeps its `Conformance`."""

    def __init__(self, say: Callable[[float], None]) -> None:
        self.say, self.done, self.total = say, 0, 0
        self.conformance: plugin.Conformance | None = None
        self.ids: list[str] = []
        self.errors: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = len(session.items)
        self.ids = [plugin.case_id(item) for item in session.items]
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
    say: Callable[[float], None] = lambda share: None,
    more: Sequence[object] = (),
) -> Outcome:
    """Run the suite in this process.

    Parameters
    ----------
    backend : str
        ``NAME`` or ``NAME:DEVICE``.
    level : {"core", "all"}
        Only what every backend has to have, or everything that it declares too.
    grid : {"quick", "full"}
        How many sizes and dtypes.
    cases : sequence of str
        Ids; all cases by default.
    report : path, optional
        Where to write the record.
    allow_missing : bool
        Succeed where the backend is not available here.
    say : callable
        Is told the share of the cases that have run.
    more : sequence of object
        Other plugins of pytest, such as one that ends the run in time.

    Returns
    -------
    Outcome

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
    code = _pytest(backend, arguments, watcher, *more, modules=_modules(cases))
    if watcher.errors:
        raise RuntimeError("the suite cannot be collected:\n" + "\n".join(watcher.errors))
    found = watcher.conformance
    if found is not None and found.refused:
        raise ValueError(found.refused)
    return Outcome(None if found is None else found.run, code)


def list_cases(backend: str, *, level: str = "all", grid: str = "quick") -> list[str]:
    """List the ids of the cases that a run would have, in their order."""
    watcher = _Watcher(lambda share: None)
    _pytest(backend, [f"--level={level}", f"--grid={grid}", "--collect-only"], watcher)
    return watcher.ids


def _modules(cases: Sequence[str]) -> list[str]:
    """Name the modules that some cases are in; all of them, where an id is nobody's."""
    names = sorted({f"test_{case.partition('::')[0]}" for case in cases})
    if not names or not all((SETTINGS.parent / f"{name}.py").is_file() for name in names):
        return [plugin.SUITE]
    return [f"{plugin.SUITE}.{name}" for name in names]


def _pytest(
    backend: str,
    arguments: list[str],
    watcher: _Watcher,
    *more: object,
    modules: Sequence[str] = (plugin.SUITE,),
) -> int:
    plugin.parse_backend(backend)
    # Plugins that are installed for other purposes have no say in what conforms.
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
