"""The sanitizers and the profiler on a GPU, with scripts that stand in for them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdcore_conformance.gpu import tools
from pdcore_conformance.gpu.step import case_of
from pdcore_conformance.gpu.worker import run_step

#: A stand-in for CuPy, on whose kernel a tool is tried.
CUPY = """
class _One:
    def sum(self): return self
    def item(self): return 3
def arange(n): return _One()
"""
#: Runs the command that follows the options of the tool, as the tool does.
RUNS = 'while [ "$1" != "$PYTHON" ]; do shift; done; echo "TOOL"; exec "$@"'
PROBED = 'case "$*" in *arange*) exit 0;; esac; '
FINDS = PROBED + 'echo "========= Invalid __global__ read of size 4 bytes"; exit 86'
DIES = PROBED + 'echo "Error: out of memory"; exit 3'


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cupy.py").write_text(CUPY, encoding="utf-8")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    return tmp_path


def tool(folder: Path, name: str, lines: str) -> None:
    """Write a shell script with the name of a tool."""
    script = folder / name
    script.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
    script.chmod(0o755)


def outcome(stage: str, name: str, seconds: float = 60.0) -> tuple[str, str]:
    step = {"sanitizer": tools.sanitizer, "profile": tools.profile}[stage]("numpy:cpu", seconds)
    case, _ = run_step(stage, name, step)
    assert case["id"] == case_of(stage, name)
    return case["outcome"], case["message"] or ""


@pytest.mark.parametrize(
    ("stage", "name", "program"),
    [("sanitizer", "racecheck", "compute-sanitizer"), ("profile", "ncu", "ncu")],
)
def test_the_calls_run_under_a_tool(
    path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, name: str, program: str
) -> None:
    monkeypatch.setattr(tools, "PROFILED", tools.UNDER_TOOLS[:1])
    tool(path, program, RUNS.replace("TOOL", f"TOOL {tools.KERNELS}"))
    assert outcome(stage, name) == ("passed", "")


def test_a_profile_of_no_kernel_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "PROFILED", tools.UNDER_TOOLS[:1])
    tool(path, "ncu", RUNS)
    got, message = outcome("profile", "ncu")
    assert got == "not claimed"
    assert message.startswith("ncu has looked at no kernel: TOOL")


@pytest.mark.parametrize(
    ("lines", "expected", "text"),
    [
        (FINDS, "failed", "Invalid __global__ read of size 4 bytes"),
        (DIES, "error", "exit code 3: Error: out of memory"),
        ("exit 0", "error", "exit code 0"),  # the calls were not made
        ("echo no device; exit 3", "not claimed", "cannot run a kernel here: no device"),
        (PROBED + "sleep 60", "not claimed", "compute-sanitizer was not through in 1 s"),
    ],
)
def test_the_outcome_is_that_of_the_tool(path: Path, lines: str, expected: str, text: str) -> None:
    tool(path, "compute-sanitizer", lines)
    # Two tools share what is left before the margin.
    seconds = 2.0 + tools.MARGIN if "sleep" in lines else 120.0
    got, message = outcome("sanitizer", "memcheck", seconds)
    assert got == expected
    assert text in message


def test_a_missing_tool_is_recorded() -> None:
    for stage, name, program in (
        ("sanitizer", "memcheck", "compute-sanitizer"),
        ("profile", "ncu", "ncu"),
    ):
        got, message = outcome(stage, name)
        assert got == "not claimed"
        assert message.startswith(f"{program} is not on the path")


def test_the_children_of_a_tool_end_with_the_worker(path: Path) -> None:
    """A child of the tool holds the GPU: it must end when the worker is ended."""
    fifo = path / "pipe"
    os.mkfifo(fifo)
    # The child holds the pipe open for as long as it lives.
    tool(path, "compute-sanitizer", PROBED + f'exec 9>"{fifo}"; echo up >&9; sleep 600 & wait')
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    options = path / "options.json"
    options.write_text(
        '{"stage": "sanitizer", "target": "numpy:cpu", "cases": ["memcheck"], "seconds": 600}',
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pdcore_conformance.gpu.worker", str(path / "journal")]
    with subprocess.Popen([*command, str(options)], start_new_session=True) as worker:
        assert select.select([reading], [], [], 60)[0]
        assert os.read(reading, 100) == b"up\n"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 128 + signal.SIGTERM
    assert select.select([reading], [], [], 30)[0]
    assert os.read(reading, 100) == b""  # nobody has it open any longer
    os.close(reading)
