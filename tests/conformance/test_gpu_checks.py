"""The checks of a GPU that are not the suite's, with stand-ins for the GPU and for its tools."""

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
from pdcore_conformance.gpu.wrappers import Check, Output


def tool(folder: Path, lines: str) -> None:
    """Put a compute-sanitizer on the path that does as the lines say."""
    script = folder / "compute-sanitizer"
    script.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
    script.chmod(0o755)


#: Runs the command that follows the tool's seven words, as the tool does.
RUNS = 'echo "COMPUTE-SANITIZER $2"; shift 6; exec "$@"'
FINDS = 'echo "========= Invalid __global__ read of size 4 bytes"; exit 86'
DIES = 'echo "Error: no such device"; exit 3'


def sanitized(name: str, seconds: float = 60.0) -> tuple[str, str | None]:
    return gpu_checks._sanitized(name, "numpy:cpu", seconds)


def test_the_calls_run_under_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    tool(tmp_path, RUNS)
    assert sanitized("racecheck") == ("passed", None)


@pytest.mark.parametrize(
    ("lines", "outcome", "said"),
    [
        (FINDS, "failed", "Invalid __global__ read of size 4 bytes"),
        (DIES, "error", "exit code 3: Error: no such device"),
        ("exit 0", "error", "exit code 0"),  # the calls were not made
        ("sleep 60", "not claimed", "compute-sanitizer --tool memcheck was not through in 1 s"),
    ],
)
def test_what_the_tool_says_is_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, outcome: str, said: str
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool(tmp_path, lines.replace("sleep", "exec sleep"))
    found, message = sanitized("memcheck", 1.0 if "sleep" in lines else 30.0)
    assert found == outcome
    assert said in (message or "")


def test_without_the_tool_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitized("memcheck") == (
        "not claimed",
        "compute-sanitizer is not on the path; it comes with the CUDA toolkit",
    )


#: A tool whose child holds the writing end of a pipe, as a program holds the GPU.
STARTS = '(echo started; exec sleep 60) > "{pipe}" & wait'


@pytest.fixture
def holding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Put such a tool on the path; the end of its pipe that tells when the child has ended."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    os.mkfifo(tmp_path / "pipe")
    tool(tmp_path, STARTS.format(pipe=tmp_path / "pipe"))
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    yield reading
    os.close(reading)


def heard(pipe: int) -> bytes:
    """Give what comes through a pipe next; nothing once all who write to it have ended."""
    ready, _, _ = select.select([pipe], [], [], 20.0)
    assert ready, "the child of the tool goes on"
    return os.read(pipe, 100)


def test_what_the_tool_has_started_ends_with_its_time(holding: int) -> None:
    assert sanitized("memcheck", 2.0)[0] == "not claimed"
    assert heard(holding) == b"started\n"
    assert heard(holding) == b""


def test_what_the_tool_has_started_ends_with_the_checks(holding: int) -> None:
    command = [sys.executable, "-m", "pdcore_conformance.gpu.checks", "numpy:cpu"]
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}
    ) as checks:
        assert heard(holding) == b"started\n"
        checks.terminate()
    assert checks.returncode == 128 + signal.SIGTERM
    assert heard(holding) == b""


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
    given = [
        Check("right", "k", 1, 1, (x, sevens)),
        Check("wrong", "k", 1, 1, (x, sevens._replace(expected=np.float32([7, 6.5])))),
        Check("newer", "k", 1, 1, (x, sevens), 80),
        Check("near", "k", 1, 1, (x, sevens._replace(expected=np.float32([7.001]), rtol=1e-3))),
    ]
    monkeypatch.setattr("pdcore_conformance.gpu.wrappers.checks", lambda: given)
    monkeypatch.setattr(gpu_checks, "compiled", lambda: device(75))
    found = {case["id"]: case for case in gpu_checks.wrapper_cases()}
    outcomes = {name: case["outcome"] for name, case in found.items()}
    assert outcomes == {
        "device::ptx[compiled]": "passed",
        "device::ptx[right]": "passed",
        "device::ptx[wrong]": "failed",
        "device::ptx[newer]": "not claimed",
        "device::ptx[near]": "passed",
    }
    assert found["device::ptx[wrong]"]["message"] == (
        "k, argument 1: 1 of 2 entries differ, the first is 1: got 7.0 (0x40e00000), expected 6.5 "
        "(0x40d00000)"
    )
    assert "compute capability 7.5" in (found["device::ptx[newer]"]["message"] or "")


def test_wrappers_that_do_not_compile_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("NVRTC_ERROR_COMPILATION")

    monkeypatch.setattr(gpu_checks, "compiled", fails)
    [case] = gpu_checks.wrapper_cases()
    assert case["outcome"] == "error"
    assert case["message"] == "RuntimeError: NVRTC_ERROR_COMPILATION"


# --- as a stage of the command --------------------------------------------------------------------

#: Lets NumPy's backend be one that is checked, on a device whose kernels are right, or all wrong.
STAND_IN = """
import os
if os.environ.get("STAND_IN"):
    import numpy as np
    from pdcore_conformance import gpu_checks

    gpu_checks.BACKENDS = ("numpy",)

    class Module:
        def __init__(self, checks):
            self.checks = list(checks)

        def get_function(self, name):
            def launch(grid, block, arguments):
                if os.environ["STAND_IN"] == "wrong":
                    return
                [check] = [c for c in self.checks if c.kernel == name and c.block == block[0]][:1]
                for given, made in zip(check.arguments, arguments):
                    if hasattr(given, "expected"):
                        made.reshape(-1)[: given.expected.size] = given.expected.reshape(-1)
            return launch

    def compiled():
        from pdcore_conformance import gpu_wrappers
        some = [c for c in gpu_wrappers.checks() if not c.name.startswith("cp.async")]
        gpu_wrappers.checks = lambda: some
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


def test_wrong_wrappers_are_red(tmp_path: Path, stand_in: Path) -> None:
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


def test_a_check_needs_a_backend_that_has_it(tmp_path: Path) -> None:
    only = ("--only", "numpy", "--no-speed", f"--case={BIAS}", f"--case={EXPONENTIAL}")
    code, text = command(tmp_path / "records", *only)
    assert code == Exit.FAILURE
    assert f"numpy:cpu: there is no case {EXPONENTIAL}" in text


def test_checks_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_checks, "compiled", lambda: device(75))
    monkeypatch.setenv("PATH", "")
    assert gpu_checks.main("numpy:cpu") == 1  # every output is 7
    said = capsys.readouterr().out
    assert "failed: device::ptx[ldmatrix.x4.trans]: load<4, true>, argument 1: " in said
    assert "not claimed: device::ptx[mma.m16n8k16, bf16]: the device has compute capability" in said
    assert gpu_checks.main("numpy:cpu", "small") == 0
    assert capsys.readouterr().out == "13 calls\n"
