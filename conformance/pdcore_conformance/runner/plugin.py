"""The pytest plugin of the suite: options, choice of cases, outcomes and the record.

::

    pytest -p pdcore_conformance.runner.plugin --pyargs pdcore_conformance.suite --backend torch:cpu

``pdcore conform torch:cpu`` does the same. One process per framework: float64, TF32 and the order
of imports are global to a process.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pdcore.errors import Exit, NoBackendError, cut, nearest
from pdcore.plugins import registry as plugins

from ..judge import user_axes
from ..judge.calls import drawn
from ..judge.combinations import Combinations, Row, covering
from ..judge.nonconforming import no_excuses
from ..judge.subject import CORE, PROPERTIES, Evidence, Subject
from ..peer_backends import PEERS
from ..record import writing as record
from ..record.environment import environment, versions
from .cases import ID, NEEDS, about, case_id, is_of_suite, needs_of
from .outcomes import new_case, outcome_of, plain

if TYPE_CHECKING:
    from ..record.types import Coverage
    from ..record.writing import Case, Run

__all__ = ["NAME", "Conformance", "exit_code", "parse_backend"]

#: Of this plugin's object in pytest.
NAME = "pdcore-conformance"
_PEER = "peer:"


def parse_backend(text: str) -> tuple[str, str]:
    """Read ``NAME[:DEVICE]``, or ``peer:NAME[:DEVICE]`` for one of `..peer_backends`.

    Returns
    -------
    name, device : str
        The device is the first that the backend declares where `text` names none.

    Raises
    ------
    ValueError
        When no backend has the name, or it declares no such device.
    """
    known = plugins.registered()
    if text.startswith(_PEER):
        text, known = text.removeprefix(_PEER), {n: i for n, i in known.items() if n in PEERS}
    name, _, device = text.partition(":")
    if name not in known:
        reason = plugins.broken.get(name) or plugins.disabled.get(name)
        why = f": {reason}" if reason else f"; {nearest(name, known)}"
        raise ValueError(f"unknown backend {name!r}{why}")
    devices = known[name].devices
    if device and device.partition(":")[0] not in devices:
        raise ValueError(f"{name} runs on {', '.join(devices)}, got device {device!r}")
    return name, device or devices[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suite."""
    group = parser.getgroup("pdcore conformance")
    group.addoption("--backend", metavar="NAME[:DEVICE]", help="the backend under test")
    group.addoption(
        "--level",
        choices=("core", "all"),
        default="all",
        help="core: only what every backend has to have",
    )
    group.addoption(
        "--grid",
        choices=("quick", "full"),
        default="quick",
        help="full: more sizes, four times the combinations",
    )
    group.addoption(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="run this case alone; may be given several times",
    )
    group.addoption("--report", metavar="FILE", help="write the record there, as JSON")
    group.addoption(
        "--allow-missing",
        action="store_true",
        help="succeed where the backend is not available here",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start a run of the suite."""
    config.addinivalue_line("markers", "claims(*features): asks for what a backend may claim")
    config.addinivalue_line("markers", "full_grid: only with --grid full")
    if config.getoption("--backend") is None:
        raise pytest.UsageError(
            "--backend NAME[:DEVICE] is missing: which backend is to be tested?"
            f" One of {', '.join(n for n in plugins.registered() if n not in PEERS)}, or peer:NAME"
        )
    try:
        backend = parse_backend(config.getoption("--backend"))
    except ValueError as error:
        raise pytest.UsageError(f"--backend: {error}") from error
    config.pluginmanager.register(Conformance(config, *backend), NAME)


class Conformance:
    """One run of the suite: it collects outcomes, and writes the record at the end.

    Attributes
    ----------
    run : Run
        The record of this run.
    refused : str or None
        The error in the options.
    """

    def __init__(self, config: pytest.Config, name: str, device: str) -> None:
        self.config = config
        self.option = config.getoption
        self.under_test: Subject | None = None
        self.refused: str | None = None
        self.run: Run = record.new_run(name, device)
        self.run["level"], self.run["grid"] = self.option("--level"), self.option("--grid")
        if self.option("--case"):
            self.run["selection"] = list(self.option("--case"))
        self.began = time.perf_counter()
        self._cases: dict[str, Case] = {}
        # The rows of the covering arrays, by the ids of their cases.
        self._rows: dict[str, Row] = {}
        self._arrays: list[Combinations] = []
        user_axes.register()
        drawn.cache_clear()  # the backend of an earlier run may have written into its arrays
        self._prepare(name, device)

    @property
    def cases(self) -> dict[str, Case]:
        """The cases so far, by id."""
        return self._cases

    def _prepare(self, name: str, device: str) -> None:
        """Load the backend, or record why it is not available here."""
        run = self.run
        run["capabilities"] = {f: plugins.registered()[name].support(f) for f in _features()}
        try:
            self.under_test = Subject(name, device)
            # The cases of a device can be listed where it is not.
            listed = self.option("collectonly") and not self.under_test.framework.unimportable()
            reason = None if listed else self.under_test.framework.available(device)
        except NoBackendError as error:
            reason = str(error).removeprefix(f"backend {name}: ")
        except ModuleNotFoundError as error:
            reason = str(error)
        if reason is not None:
            self.under_test = None
            run["available"], run["reason"] = False, reason
        run["environment"] = environment(device)
        run["versions"] = versions()
        if self.under_test is not None:
            run["versions"] |= self.under_test.backend.versions()
            run["precision"] = self.under_test.framework.policy()

    # --- collection -------------------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Pass the rows of the covering array to the test that takes a call and a way."""
        if "through" not in metafunc.fixturenames or "call" not in metafunc.fixturenames:
            return
        rows = {f"{row.through}-{row.call.label}": row for row in self.combinations()}
        self._rows |= {f"axes::combination[{name}]": row for name, row in rows.items()}
        metafunc.parametrize(
            ("call", "through"), [(row.call, row.through) for row in rows.values()], ids=list(rows)
        )

    def combinations(self) -> list[Row]:
        """Return the rows of the covering arrays: one in the quick grid, four in the full one."""
        wanted = self.option("--case")
        if self.under_test is None or (wanted and not any("combination[" in n for n in wanted)):
            return []
        claimed = {f for f in _features() if self.under_test.claims(f)}
        if self.option("--level") == "core":
            claimed &= CORE
        seeds = 4 if self.option("--grid") == "full" else 1
        self._arrays = [covering(frozenset(claimed), seed) for seed in range(seeds)]
        return [row for array in self._arrays for row in array.rows]

    def coverage(self) -> Coverage | None:
        """Return how many combinations of values passed; None where no such case ran."""
        passed = [
            row
            for name, row in self._rows.items()
            if name in self._cases and self._cases[name]["outcome"] == "passed"
        ]
        if not passed:
            return None
        pairs, all_pairs, triples, all_triples = self._arrays[0].covered(passed)
        return {"pairs": [pairs, all_pairs], "triples": [triples, all_triples]}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the cases that the options name, and mark the known failures of the backend."""
        ours = [item for item in items if item.nodeid and is_of_suite(item)]
        for item in ours:
            item.stash[ID] = case_id(item)
            item.stash[NEEDS] = needs_of(item)
        known = {item.stash[ID] for item in ours}
        failures = plugins.known_failures(self.run["backend"])
        self._dead(set(failures) - known, bool(ours))
        wanted = self.option("--case")
        for unknown in sorted(set(wanted) - known):
            close = difflib.get_close_matches(unknown[:500], known, n=1, cutoff=0.0)
            self.refused = (
                f"unknown case {cut(unknown)!r}; did you mean {close}? "
                "`pdcore conform NAME --list` has all of them"
            )
            raise pytest.UsageError(f"--case: {self.refused}")
        kept: list[pytest.Item] = []
        dropped: list[pytest.Item] = []
        for item in items:
            (kept if item not in ours or self._wanted(item, wanted) else dropped).append(item)
        for item in kept:
            reason = failures.get(item.stash.get(ID, ""))
            if reason is not None:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        if dropped:
            self.config.hook.pytest_deselected(items=dropped)
        items[:] = kept

    def _wanted(self, item: pytest.Item, wanted: list[str]) -> bool:
        if self.under_test is None:
            return False
        if wanted:
            return item.stash[ID] in wanted
        if item.get_closest_marker("full_grid") and self.option("--grid") != "full":
            return False
        needs = item.stash[NEEDS]
        return self.option("--level") == "all" or needs <= CORE

    def _dead(self, ids: set[str], collected: bool) -> None:
        """Fail for known failures that name no case: one might hide a new failure."""
        for name in sorted(ids) if collected and not self.option("--case") else ():
            self._cases[name] = new_case(
                name,
                "core",
                [],
                "failed",
                message="listed as a known failure, but the suite has no such case: remove it",
            )

    # --- running ----------------------------------------------------------------------------------

    @pytest.fixture
    def subject(self, request: pytest.FixtureRequest) -> Iterator[Subject]:
        """Return the backend under test, without evidence of earlier cases."""
        assert self.under_test is not None
        self.under_test.evidence = Evidence()
        yield self.under_test
        request.node.user_properties.append(("evidence", plain(self.under_test.evidence)))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip a case whose feature the backend does not claim, with the reason."""
        if self.under_test is None or NEEDS not in item.stash:
            return
        needs: frozenset[str] = item.stash[NEEDS]
        missing = [f for f in needs & PROPERTIES if not self.under_test.claims(f)]
        if missing:
            pytest.skip(f"not claimed: {', '.join(sorted(missing))}")
        if "bfloat16" in needs and find_spec("ml_dtypes") is None:
            pytest.skip("not judged: NumPy's bfloat16 is that of ml_dtypes, which is not installed")

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Any:
        """Fail where a backend skips its case; no case skips itself: see `pytest_runtest_setup`."""
        if ID not in pyfuncitem.stash:
            return (yield)
        with no_excuses():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """Add to the report what the controller of a distributed run needs."""
        report = yield
        if ID in item.stash:
            report.pdcore = about(item)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome of a phase of a case."""
        described = getattr(report, "pdcore", None)
        if described is None:
            return
        case = self._cases.get(described["id"])
        if case is None:
            case = self._cases[described["id"]] = new_case(**described, outcome="error")
        case["seconds"] += report.duration
        evidence: Any = dict(report.user_properties).get("evidence")
        if evidence and report.when == "teardown":
            case["verdicts"] = evidence["verdicts"]
            case["ratio"] = evidence["ratio"]
            if case["outcome"] == "passed" and evidence["outcome"]:
                case["outcome"] = evidence["outcome"]
            case["message"] = case["message"] or evidence["note"]
        if report.when == "call" or report.outcome != "passed":
            outcome, message = outcome_of(report)
            if report.when == "teardown" and case["outcome"] == "failed":
                return
            case["outcome"], case["message"] = outcome, message

    # --- the end ----------------------------------------------------------------------------------

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the record, and set the exit code of the run."""
        if hasattr(self.config, "workerinput"):
            return
        run = self.run
        run["seconds"] = time.perf_counter() - self.began
        run["cases"] = [self._cases[name] for name in sorted(self._cases)]
        for case in run["cases"]:
            run["counts"][case["outcome"]] += 1
        coverage = self.coverage()
        if coverage is not None:
            run["coverage"] = coverage
        path = self.option("--report")
        interrupted = exitstatus in (
            pytest.ExitCode.INTERRUPTED,
            pytest.ExitCode.INTERNAL_ERROR,
            pytest.ExitCode.USAGE_ERROR,
        )
        if path and not interrupted:
            record.save(Path(path), [run], replace=True)
        if not interrupted and not self.option("collectonly"):
            session.exitstatus = exit_code(run, self.option("--allow-missing"))

    def pytest_report_header(self) -> str:
        """Return a line with the backend, its versions and its precision."""
        run = self.run
        if not run["available"]:
            return f"pdcore conformance: {run['backend']} is not available: {run['reason']}"
        versions = ", ".join(f"{name} {text}" for name, text in run["versions"].items())
        return (
            f"pdcore conformance: {run['backend']}:{run['device']} ({versions}); {run['precision']}"
        )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the number of cases by outcome."""
        counts = ", ".join(f"{n} {name}" for name, n in self.run["counts"].items() if n)
        name = f"{self.run['backend']}:{self.run['device']}"
        terminalreporter.write_sep("=", f"pdcore conformance of {name}: {counts or 'nothing ran'}")
        if not self.run["available"]:
            terminalreporter.write_line(f"not available: {self.run['reason']}")


def exit_code(run: Run, allow_missing: bool = False) -> int:
    """Return the exit code of a run; 0 only where a case passed and none failed."""
    counts = run["counts"]
    if not run["available"]:
        return int(Exit.DONE if allow_missing else Exit.NO_BACKEND)
    if counts["failed"] or counts["error"]:
        return int(Exit.NUMERICS)
    return int(Exit.DONE if counts["passed"] else Exit.FAILURE)


def _features() -> list[str]:
    from pdcore.backend import FEATURES

    return list(FEATURES)
