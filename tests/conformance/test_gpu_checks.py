"""The checks on a GPU that are not in the suite, with stand-ins for the GPU and its tools."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_command import BIAS, SOFTMAX, command, runs_of

from pdcore.errors import Exit
from pdcore_conformance.gpu import checks as gpu_checks
from pdcore_conformance.gpu.ptx_wrappers import Check, Output


def tool(folder: Path, lines: str) -> None:
    """Write a shell script named compute-sanitizer with these lines."""
    script = folder / "compute-sanitizer"
    script.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
    script.chmod(0o755)


#: Runs the command that follows the options of the tool, as the tool does.
RUNS = 'echo "COMPUTE-SANITIZER $2"; shift 6; exec "$@"'
FINDS = 'echo "========= Invalid __global__ read of size 4 bytes"; exit 86'
DIES = 'echo "Error: no such device"; exit 3'


def sanitized(name: str, seconds: float = 60.0) -> tuple[str, str | None]:
    return gpu_checks._sanitized(name, "numpy:cpu", seconds)


def test_the_calls_run_under_compute_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    tool(tmp_path, RUNS)
    assert sanitized("racecheck") == ("passed", None)


@pytest.mark.parametrize(
    ("lines", "outcome", "text"),
    [
        (FINDS, "failed", "Invalid __global__ read of size 4 bytes"),
        (DIES, "error", "exit code 3: Error: no such device"),
        ("exit 0", "error", "exit code 0"),  # the calls were not made
        ("sleep 60", "not claimed", "compute-sanitizer --tool memcheck was not through in 1 s"),
    ],
)
def test_the_outcome_is_that_of_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, outcome: str, text: str
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool(tmp_path, lines.replace("sleep", "exec sleep"))
    result, message = sanitized("memcheck", 1.0 if "sleep" in lines else 30.0)
    assert result == outcome
    assert text in (message or "")


def test_a_missing_tool_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitized("memcheck") == (
        "not claimed",
        "compute-sanitizer is not on the path; it comes with the CUDA toolkit",
    )


#: A tool whose child keeps the writing end of a pipe open, as a program keeps the GPU.
STARTS = '(echo started; exec sleep 60) > "{pipe}" & wait'


@pytest.fixture
def pipe_of_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Put such a tool on the path; return the reading end, which ends when the child ends."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    os.mkfifo(tmp_path / "pipe")
    tool(tmp_path, STARTS.format(pipe=tmp_path / "pipe"))
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    yield reading
    os.close(reading)


def read_next(pipe: int) -> bytes:
    """Return the next bytes of a pipe; empty when every process that writes to it has ended."""
    ready, _, _ = select.select([pipe], [], [], 20.0)
    assert ready, "the child of the tool goes on"
    return os.read(pipe, 100)


def test_the_child_of_the_tool_ends_at_the_time_limit(pipe_of_child: int) -> None:
    assert sanitized("memcheck", 2.0)[0] == "not claimed"
    assert read_next(pipe_of_child) == b"started\n"
    assert read_next(pipe_of_child) == b""


def test_the_child_of_the_tool_ends_with_the_checks(pipe_of_child: int) -> None:
    command = [sys.executable, "-m", "pdcore_conformance.gpu.checks", "numpy:cpu"]
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}
    ) as checks:
        assert read_next(pipe_of_child) == b"started\n"
        checks.terminate()
    assert checks.returncode == 128 + signal.SIGTERM
    assert read_next(pipe_of_child) == b""


class FakeModule:
    """Kernels that fill every output with one number."""

    def get_function(self, name: str) -> Any:
        return lambda grid, block, arguments: [x.fill(7) for x in arguments if x.flags.writeable]


def device(capability: int) -> dict[str, Any]:
    def array(x: Any) -> Any:
        x = x.copy()
        x.flags.writeable = False
        return x

    return {
        "module": FakeModule(),
        "capability": capability,
        "array": array,
        "host": np.asarray,
        "empty": lambda shape, dtype: np.zeros(shape, dtype),
    }


def test_wrappers_are_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.arange(3, dtype=np.float32)
    sevens = Output(np.full(2, 7, np.float32), (3,))
    checks = [
        Check("right", "k", 1, 1, (x, sevens)),
        Check("wrong", "k", 1, 1, (x, sevens._replace(expected=np.float32([7, 6.5])))),
        Check("newer", "k", 1, 1, (x, sevens), 80),
        Check("near", "k", 1, 1, (x, sevens._replace(expected=np.float32([7.001]), rtol=1e-3))),
    ]
    monkeypatch.setattr("pdcore_conformance.gpu.ptx_wrappers.checks", lambda: checks)
    monkeypatch.setattr(gpu_checks, "compiled", lambda: device(75))
    cases = {case["id"]: case for case in gpu_checks.wrapper_cases()}
    outcomes = {name: case["outcome"] for name, case in cases.items()}
    assert outcomes == {
        "device::ptx[compiled]": "passed",
        "device::ptx[right]": "passed",
        "device::ptx[wrong]": "failed",
        "device::ptx[newer]": "not claimed",
        "device::ptx[near]": "passed",
    }
    assert cases["device::ptx[wrong]"]["message"] == (
        "k, argument 1: 1 of 2 entries differ, the first is 1: got 7.0 (0x40e00000), expected 6.5 "
        "(0x40d00000)"
    )
    assert "compute capability 7.5" in (cases["device::ptx[newer]"]["message"] or "")


def test_wrappers_that_do_not_compile_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("NVRTC_ERROR_COMPILATION")

    monkeypatch.setattr(gpu_checks, "compiled", fails)
    [case] = gpu_checks.wrapper_cases()
    assert case["outcome"] == "error"
    assert case["message"] == "RuntimeError: NVRTC_ERROR_COMPILATION"


# --- as a stage of the command --------------------------------------------------------------------

#: Makes the NumPy backend one that is checked, with kernels that are all right, or all wrong.
STAND_IN = """
import os
if os.environ.get("STAND_IN"):
    import numpy as np
    from pdcore_conformance.gpu import checks as gpu_checks

    gpu_checks.BACKENDS = ("numpy",)

    class Module:
        def __init__(self, checks):
            self.checks = list(checks)

        def get_function(self, name):
            def launch(grid, block, arguments):
                if os.environ["STAND_IN"] == "wrong":
                    return
                [check] = [c for c in self.checks if c.kernel == name and c.block == block[0]][:1]
                for output, x in zip(check.arguments, arguments):
                    if hasattr(output, "expected"):
                        x.reshape(-1)[: output.expected.size] = output.expected.reshape(-1)
            return launch

    def compiled():
        from pdcore_conformance.gpu import ptx_wrappers
        some = [c for c in ptx_wrappers.checks() if not c.name.startswith("cp.async")]
        ptx_wrappers.checks = lambda: some
        return {"module": Module(some), "capability": 90, "array": np.asarray,
                "empty": lambda shape, dtype: np.zeros(shape, dtype), "host": np.asarray}

    gpu_checks.compiled = compiled
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(STAND_IN, encoding="utf-8")
    return folder


EXPONENTIAL, MEMCHECK = "device::ptx[ex2.approx]", "device::compute-sanitizer[memcheck]"
CASES = (
    "--only",
    "numpy",
    "--no-speed",
    *(f"--case={name}" for name in (SOFTMAX, EXPONENTIAL, MEMCHECK)),
)


def test_checks_are_a_stage(tmp_path: Path, stand_in: Path) -> None:
    out = tmp_path / "records"
    code, text = command(out, *CASES, path=stand_in, STAND_IN="right", PATH=str(tmp_path))
    assert code == Exit.DONE, text
    assert "numpy:cpu: wrappers and sanitizers, " in text
    assert f"{MEMCHECK}: compute-sanitizer is not on the path" in text
    for name in ("record.json", "numpy-cpu.numerics.json"):
        run = runs_of(out / name)["numpy:cpu"]
        outcomes = {case["id"]: case["outcome"] for case in run["cases"]}
        assert outcomes == {SOFTMAX: "passed", EXPONENTIAL: "passed", MEMCHECK: "not claimed"}
        assert run["counts"]["passed"] == 2
        assert run["counts"]["not claimed"] == 1


@pytest.mark.nightly
def test_wrong_wrappers_fail(tmp_path: Path, stand_in: Path) -> None:
    tool(tmp_path, FINDS)
    path = f"{tmp_path}:/usr/bin:/bin"
    code, text = command(
        tmp_path / "records",
        "--only",
        "numpy",
        *CASES[3:],
        path=stand_in,
        STAND_IN="wrong",
        PATH=path,
    )
    assert code == Exit.NUMERICS, text
    assert f"failed: {EXPONENTIAL}: exponential, argument 1: " in text
    assert f"failed: {MEMCHECK}: ========= Invalid __global__ read" in text
    assert "alone: python -m pdcore_conformance.gpu.checks numpy:cpu" in text
    assert "not reached: speed of numpy:cpu: its numerics are not green" in text


@pytest.mark.nightly
def test_a_check_needs_a_backend_with_cuda_kernels(tmp_path: Path) -> None:
    only = ("--only", "numpy", "--no-speed", f"--case={BIAS}", f"--case={EXPONENTIAL}")
    code, text = command(tmp_path / "records", *only)
    assert code == Exit.FAILURE
    assert f"numpy:cpu: there is no case {EXPONENTIAL}" in text


def test_the_command_of_the_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_checks, "compiled", lambda: device(75))
    monkeypatch.setenv("PATH", "")
    assert gpu_checks.main("numpy:cpu") == 1  # every output is 7
    text = capsys.readouterr().out
    assert "failed: device::ptx[ldmatrix.x4.trans]: load<4, true>, argument 1: " in text
    assert "not claimed: device::ptx[mma.m16n8k16, bf16]: the device has compute capability" in text
    assert gpu_checks.main("numpy:cpu", "small") == 0
    assert capsys.readouterr().out == "13 calls\n"
