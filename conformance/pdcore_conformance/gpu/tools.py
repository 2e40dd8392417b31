"""NVIDIA's tools: the sanitizers, and Nsight Compute; not every machine lets them run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from ..judge.nonconforming import Nonconforming
from .calls import PROFILED, UNDER_TOOLS
from .step import Found, NotHere, Step

__all__ = ["PROBE", "SANITIZERS", "TOOL_ERROR", "end_tool", "profile", "sanitizer"]

#: The tools of compute-sanitizer.
SANITIZERS = ("memcheck", "racecheck")
#: The sections of Nsight Compute's report.
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
#: A part of the names of the kernels that it looks at, those of tensor cores.
KERNELS = "scores_mma"
#: Seconds before the end of the stage at which a tool is ended, so that the step tells of it.
MARGIN = 3.0
#: Seconds of a probe, a call of a tool on small kernels: CuPy's import takes some of them.
PROBE = 20.0
#: The exit code of compute-sanitizer when a tool reports an error.
TOOL_ERROR = 86
#: The most characters of what a tool prints that are kept.
KEPT = 60_000

#: The tool that runs.
_tools: list[subprocess.Popen[str]] = []

_ONE_KERNEL = "import cupy; cupy.arange(3).sum().item()"
_CALLS = (
    "import sys; from pdcore_conformance.gpu.calls import make; "
    "print(make(sys.argv[1], sys.argv[2:]), 'calls')"
)


def sanitizer(target: str, seconds: float) -> Step:
    """Return the step that runs `UNDER_TOOLS` under a tool of compute-sanitizer."""
    until = time.monotonic() + seconds - MARGIN

    def step(name: str) -> Found:
        program = _found("compute-sanitizer")
        options = ["--tool", name, "--error-exitcode", str(TOOL_ERROR), "--print-limit", "5"]
        _probe([program, *options])
        # What is left is for this tool and those after it.
        share = (until - time.monotonic()) / (len(SANITIZERS) - SANITIZERS.index(name))
        done = _run([program, *options, *_python(_CALLS, target, *UNDER_TOOLS)], share)
        text = " ".join(done.stdout.split())[-600:]
        if done.returncode == TOOL_ERROR:
            raise Nonconforming(text)
        if done.returncode or " calls" not in done.stdout:
            raise RuntimeError(f"exit code {done.returncode}: {text}")
        return None, {"printed": done.stdout[-KEPT:]}

    return step


def profile(target: str, seconds: float) -> Step:
    """Return the step that runs `PROFILED` under Nsight Compute."""
    until = time.monotonic() + seconds - MARGIN

    def step(name: str) -> Found:
        program = _found("ncu")
        _probe([program])
        # It runs a kernel again for each section, and prints at the end: a few launches.
        options = ["--launch-count", "6", "--page", "details", "--kernel-name", f"regex:{KERNELS}"]
        for section in SECTIONS:
            options += ["--section", section]
        calls = _python(_CALLS, target, *PROFILED)
        done = _run([program, *options, *calls], until - time.monotonic())
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-600:]}")
        if KERNELS not in done.stdout:
            raise NotHere(f"ncu has looked at no kernel: {' '.join(done.stdout.split())[-300:]}")
        return None, {"printed": done.stdout[-KEPT:]}

    return step


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise NotHere(f"{program} is not on the path; it comes with the CUDA toolkit")
    return path


def _probe(command: Sequence[str]) -> None:
    """Raise `NotHere` where a tool cannot even watch one kernel."""
    done = _run([*command, *_python(_ONE_KERNEL)], PROBE)
    if done.returncode:
        text = " ".join(done.stdout.split())[-300:]
        raise NotHere(f"{os.path.basename(command[0])} cannot run a kernel here: {text}")


def _python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command; end it and its children, which hold the GPU, when it takes too long."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        _tools.append(process)
        try:
            out, _ = process.communicate(timeout=max(seconds, 1.0))
        except BaseException as error:
            end_tool()
            if isinstance(error, subprocess.TimeoutExpired):
                name = os.path.basename(command[0])
                raise NotHere(f"{name} was not through in {seconds:.0f} s") from None
            raise
        finally:
            _tools.clear()
    return subprocess.CompletedProcess(command, process.returncode, out)


def end_tool() -> None:
    """End the tool that runs, and its children, which hold the GPU."""
    for process in _tools:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
