"""No backend passes by accident: skips, exits, crashes and endless calls are failures."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from excusing_backends import ENDS, RAISES
from installing import VARIABLES, add_distribution, fresh, rediscovered

from pdcore.errors import Exit
from pdcore_conformance.judge.nonconforming import Nonconforming, no_excuses
from pdcore_conformance.record import json_schema
from pdcore_conformance.record.compact import compacted, expanded
from pdcore_conformance.record.writing import load, save
from pdcore_conformance.report import summary
from pdcore_conformance.report.view import end_of
from pdcore_conformance.runner.watching import Journal, conform_watched

BEFORE = "declaration::core_feature_is_declared[float32]"
ENDING = "kernels::kernel_is_computed[softmax-float32]"
AFTER = "support::causal_is_upper_left[causal-float32-rows=4-keys=9]"
CASES = (BEFORE, ENDING, AFTER)
#: A hypothesis test, which would drop an example that skips.
DRAWN = "properties::any_call[forward]"

#: A script that judges backends in one process, and prints the outcome and message of each case.
IN_PROCESS = """
import json
from pdcore_conformance.runner.conforming import conform
results = {{}}
for name in {names!r}:
    run, code = conform(name, cases={cases!r} + {drawn!r} * (name == "assumes"))
    results[name] = code, {{c["id"]: [c["outcome"], c["message"]] for c in run["cases"]}}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder in which a distribution with these backends is installed."""
    folder = tmp_path_factory.mktemp("site")
    add_distribution(folder, "excusing", {"excusing": "excusing_backends"})
    return folder


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    with rediscovered(monkeypatch):
        yield


@pytest.fixture(scope="module")
def excused(site):
    names = [name for name in RAISES if name != "interrupts"]
    return fresh(IN_PROCESS.format(names=names, cases=[ENDING, AFTER], drawn=[DRAWN]), site)


@pytest.mark.parametrize("name", [name for name in RAISES if name != "interrupts"])
def test_an_exception_that_ends_tests_is_a_failure(excused, name):
    code, cases = excused[name]
    assert code == Exit.NUMERICS
    assert cases[AFTER] == ["passed", None]
    for case in {ENDING, DRAWN} & set(cases):
        outcome, message = cases[case]
        assert outcome == "failed"
        assert "where it should compute" in message


def test_ctrl_c_is_the_users_unless_the_process_ignores_it(interruptible):
    with pytest.raises(KeyboardInterrupt), no_excuses():
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(Nonconforming, match="KeyboardInterrupt"), no_excuses():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_keyboard_interrupt_of_the_backend_is_a_failure(installed):
    run, code = conform_watched("interrupts", cases=CASES)
    assert outcomes(run) == {BEFORE: "passed", ENDING: "failed", AFTER: "passed"}
    assert code == Exit.NUMERICS
    assert "ended" not in run


def outcomes(run: Any) -> dict[str, str]:
    return {case["id"]: case["outcome"] for case in run["cases"]}


@pytest.mark.parametrize(
    ("name", "how", "printed"),
    [
        ("exits_at_once", "exit code 0", ""),
        ("segfaults", "signal SIGSEGV", "Segmentation fault"),
        ("aborts", "signal SIGABRT", "terminate called, as planted"),
        ("blocks", "no end after 4 s", "before the block"),
    ],
)
def test_the_end_of_the_process_is_a_failure_and_in_the_record(
    installed, name, how, printed, tmp_path
):
    assert {*ENDS} == {"exits_at_once", "segfaults", "aborts", "blocks"}
    report, shares = tmp_path / "record.json", []
    began = time.monotonic()
    run, code = conform_watched(name, cases=CASES, limit=4, report=report, say=shares.append)
    assert time.monotonic() - began < 60
    assert code == Exit.NUMERICS
    assert outcomes(run) == {BEFORE: "passed", ENDING: "failed", AFTER: "error"}
    assert run["counts"] == dict.fromkeys(run["counts"], 0) | {"passed": 1, "failed": 1, "error": 1}
    messages = {case["id"]: case["message"] for case in run["cases"]}
    assert messages[ENDING] == f"the process ended: {how}"
    assert messages[AFTER] == f"did not run: the process ended before in {ENDING}: {how}"
    assert run["ended"]["how"] == how
    assert run["ended"]["case"] == ENDING
    assert printed in run["ended"]["log"]
    if name != "exits_at_once":
        assert "excusing_backends.py" in run["ended"]["log"]  # the calls, innermost first
    assert shares[-1] == pytest.approx(1 / 3)
    record = load(report)
    assert record["runs"] == [run]
    assert end_of(run) == f"{how}, in {ENDING}"
    assert summary.as_dict(record)["runs"][0]["ended"] == end_of(run)
    save(tmp_path / "compact.json", [run], compact=True)
    assert load(tmp_path / "compact.json")["runs"][0]["ended"] == run["ended"]
    assert expanded(compacted([run]))["runs"][0]["ended"] == run["ended"]


def test_the_schema_has_the_end_as_optional():
    definitions = json_schema()["$defs"]
    assert "ended" in definitions["Run"]["properties"]
    assert "ended" not in definitions["Run"]["required"]
    assert set(definitions["ProcessEnd"]["required"]) == {"how", "case", "log"}


def test_a_right_backend_passes_and_wrong_names_are_refused(tmp_path):
    run, code = conform_watched("numpy", cases=CASES, report=tmp_path / "record.json")
    assert set(outcomes(run).values()) == {"passed"}
    assert code == Exit.DONE
    assert run["cases"][0]["verdicts"] or run["cases"][1]["verdicts"]
    with pytest.raises(ValueError, match="did you mean 'numpy'"):
        conform_watched("numpi")
    with pytest.raises(ValueError, match="kernel_is_computed"):
        conform_watched("numpy", cases=["kernels::kernel_is_compute"])


def command(*arguments: str, site: Path, **more: Any) -> subprocess.Popen[str]:
    variables = {n: text for n, text in os.environ.items() if n not in VARIABLES}
    variables["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-m", "pdcore", "conform", *arguments],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def test_ctrl_c_ends_the_command_and_its_child(site, tmp_path, interruptible):
    process = command("blocks", "--case", ENDING, site=site, cwd=tmp_path, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    child = ""
    for _ in range(300):
        time.sleep(0.1)
        child = children.read_text().strip() if children.exists() else ""
        if child:
            break
    assert child
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the group in the foreground
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, out + errors
    assert "ended by SIGINT" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(child), 0)


def test_the_command_shows_the_end(site, tmp_path):
    process = command("exits_at_once", "--case", ENDING, site=site, cwd=tmp_path)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == Exit.NUMERICS, out + errors
    assert f"the process ended exit code 0, in {ENDING}" in out
    assert "1 of 1 cases failed" in errors


class Growing(io.BytesIO):
    """A file to which a child writes the rest of a line as soon as its end has been read."""

    def __init__(self, rests: list[bytes]) -> None:
        super().__init__(rests[0])
        self.rests = rests[1:]

    def grow(self) -> None:
        at = self.tell()
        if self.rests and at == len(self.getvalue()):
            self.write(self.rests.pop(0))
            self.seek(at)

    def read(self, size: int | None = -1) -> bytes:
        text = super().read(size)
        self.grow()
        return text

    def readline(self, size: int | None = -1) -> bytes:
        text = super().readline(size)
        self.grow()
        return text

    def __next__(self) -> bytes:
        line = self.readline()
        if not line:
            raise StopIteration
        return line


def test_a_line_that_is_written_in_parts_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [b'{"began": "a"}\n{"began', b'": "b"}\n{"be', b'gan": "c"}\n']
    (tmp_path / "journal").touch()
    for count in (1, 2, 3):
        journal = Journal(tmp_path / "journal")
        monkeypatch.setattr(Path, "open", lambda *_, count=count: Growing(parts[:count]))
        seen = [entry["began"] for entry in journal.read()]
        monkeypatch.setattr(Path, "open", lambda *_: io.BytesIO(b"".join(parts)))
        assert seen + [entry["began"] for entry in journal.read()] == ["a", "b", "c"]
