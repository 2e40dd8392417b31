"""Check a backend's CUDA kernels on a GPU, beyond the numbers that the suite checks.

::

    python -m pdcore_conformance.gpu.checks cupy:cuda

checks that every wrapper of a PTX instruction returns what it should, and runs small calls under
the memory and race checkers of NVIDIA's compute-sanitizer, where that is on the path. Each check is
a case of the record.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..record.writing import Case, Outcome
    from .ptx_wrappers import Check

__all__ = [
    "BACKENDS",
    "GROUP",
    "TOOLS",
    "cases",
    "is_check",
    "is_checked",
    "main",
    "small_calls",
    "exit_on_sigterm",
]

#: The backends that have CUDA kernels.
BACKENDS = ("cupy",)
#: The group of these cases in the record.
GROUP = "device"
#: The tools of compute-sanitizer that are used.
TOOLS = ("memcheck", "racecheck")
#: Seconds for one tool, under which a kernel runs tens of times as long.
PATIENCE = 240.0
#: The exit code of compute-sanitizer when a tool reports an error.
TOOL_ERROR = 86


class SmallCall(NamedTuple):
    """A call under a sanitizer, of 70 queries and 83 keys: one full tile and a partial one.

    Attributes
    ----------
    spec, dtype : str
    widths : (int, int)
        Columns of queries and keys, and of values. Tensor cores compute only some widths.
    bias, key_mask : tuple of int, optional
        The shapes of these arguments.
    backward : bool
        Whether gradients are computed; some kernels run only without.
    """

    spec: str
    dtype: str
    widths: tuple[int, int] = (40, 24)
    bias: tuple[int, ...] | None = None
    key_mask: tuple[int, ...] | None = None
    backward: bool = True


#: Calls that together run every kernel.
CALLS = (
    SmallCall("causal+sh(1,2)", "float32"),
    SmallCall("softmax", "float16", bias=(70, 83)),
    SmallCall("sparse(20,3)", "bfloat16"),
    SmallCall("bn", "float32"),
    SmallCall("linear+sparse(9,2)", "float64"),
    SmallCall("polynomial", "float32", key_mask=(1, 83)),
    SmallCall("causal+sh(1,2)", "bfloat16", (64, 64)),
    SmallCall("softmax", "float16", (128, 128), bias=(70, 83)),
    SmallCall("bn", "bfloat16", (64, 64), backward=False),
    SmallCall("linear", "float32"),
    SmallCall("causal+linear", "float32"),
    SmallCall("causal+random_features(8)", "float32"),
    SmallCall("causal+bn(statistics=prefix)", "float32"),
)


def is_check(name: str) -> bool:
    """Return whether the id of a case is that of a check in this module."""
    return name.startswith(f"{GROUP}::")


def is_checked(target: str) -> bool:
    """Return whether the backend of a target has CUDA kernels that this module checks."""
    return target.partition(":")[0] in BACKENDS


def main(target: str, part: str = "all") -> int:
    """Run and print every check; with ``"small"``, only make the calls for a sanitizer."""
    if part == "small":
        print(f"{small_calls(target)} calls")
        return 0
    exit_on_sigterm()
    checked = list(cases(target, PATIENCE * len(TOOLS)))
    for case in checked:
        print(f"{case['outcome']}: {case['id']}: {case['message'] or ''}")
    return int(any(case["outcome"] in ("failed", "error") for case in checked))


def exit_on_sigterm() -> None:
    """Exit by an exception on SIGTERM, so that `_run` stops the process group of a sanitizer."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def cases(target: str, seconds: float) -> Iterator[Case]:
    """Yield a case for each check, with `seconds` for the sanitizer in all."""
    yield from wrapper_cases()
    for tool in TOOLS:
        yield _case(
            f"compute-sanitizer[{tool}]", partial(_sanitized, tool, target, seconds / len(TOOLS))
        )


def wrapper_cases() -> Iterator[Case]:
    """Yield a case for each PTX wrapper."""
    from .ptx_wrappers import checks, difference

    device: dict[str, Any] = {}

    def build() -> tuple[Outcome, str | None]:
        device.update(compiled())
        return "passed", None

    yield _case("ptx[compiled]", build)
    if not device:
        return
    capability = device.pop("capability")
    for check in checks():

        def run(check: Check = check) -> tuple[Outcome, str | None]:
            if capability < check.capability:
                return "not claimed", f"the device has compute capability {capability / 10}"
            message = difference(check, **device)
            return ("failed", message) if message else ("passed", None)

        yield _case(f"ptx[{check.name}]", run)


def compiled() -> dict[str, Any]:
    """Compile the PTX wrappers for CuPy's device.

    Returns
    -------
    dict
        The arguments of `ptx_wrappers.difference`, and the ``capability`` of the device.
    """
    import cupy

    from .ptx_wrappers import checks, source

    capability = int(cupy.cuda.Device().compute_capability)
    names = [check.kernel for check in checks() if check.capability <= capability]
    module = cupy.RawModule(
        code=source(), options=("-std=c++17",), name_expressions=tuple(dict.fromkeys(names))
    )

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        x = cupy.empty(shape, dtype)
        x.data.memset(0xFF, x.nbytes)
        return x

    return {
        "module": module,
        "capability": capability,
        "array": cupy.asarray,
        "empty": empty,
        "host": cupy.asnumpy,
    }


def _sanitized(tool: str, target: str, seconds: float) -> tuple[Outcome, str | None]:
    """Make the small calls under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not claimed", "compute-sanitizer is not on the path; it comes with the CUDA toolkit"
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        str(TOOL_ERROR),
        "--print-limit",
        "5",
        sys.executable,
        "-m",
        "pdcore_conformance.gpu.checks",
        target,
        "small",
    ]
    try:
        done = _run(command, seconds)
    except subprocess.TimeoutExpired:
        return "not claimed", f"compute-sanitizer --tool {tool} was not through in {seconds:.0f} s"
    text = " ".join((done.stdout + done.stderr).split())[-600:]
    if done.returncode == TOOL_ERROR:
        return "failed", text
    if done.returncode or " calls" not in done.stdout:
        return "error", f"exit code {done.returncode}: {text}"
    return "passed", None


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command; stop its children, which hold the GPU, when it is stopped."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def small_calls(target: str) -> int:
    """Make each of `CALLS`, each array in its own allocation; return the number of calls."""
    import numpy as np

    from pdcore import attention, attention_vjp

    from ..judge.calls import dtype_of
    from ..judge.subject import Subject
    from ..runner.plugin import parse_backend

    name, device = parse_backend(target)
    subject = Subject(name, device)
    claimed = [call for call in CALLS if subject.claims(call.dtype)]
    rng = np.random.default_rng(0)
    with subject.framework.unpooled():
        for call in claimed:

            def draw(*shape: int, dtype: str = call.dtype) -> Any:
                x = rng.standard_normal(shape).astype(dtype_of(dtype))
                return subject.framework.asarray(x, subject.device)

            keywords: dict[str, Any] = {"backend": name}
            if call.bias is not None:
                keywords["bias"] = draw(*call.bias)
            if call.key_mask is not None:
                mask = rng.random(call.key_mask) < 0.7
                keywords["key_mask"] = subject.framework.asarray(mask, subject.device)
            dim, value_dim = call.widths
            q, k, v = draw(1, 4, 70, dim), draw(1, 2, 83, dim), draw(1, 2, 83, value_dim)
            if call.backward:
                out, _, vjp = attention_vjp(q, k, v, call.spec, **keywords)
                subject.framework.synchronize(vjp(out))
            else:
                subject.framework.synchronize(attention(q, k, v, call.spec, **keywords))
    return len(claimed)


def _case(name: str, check: Callable[[], tuple[Outcome, str | None]]) -> Case:
    """Run a check and return its case for the record; an exception is the outcome "error"."""
    started = time.perf_counter()
    outcome: Outcome
    try:
        outcome, message = check()
    except Exception as error:  # noqa: BLE001 - a check must not keep the others from running
        outcome, message = "error", f"{type(error).__name__}: {error}"
    return {
        "id": f"{GROUP}::{name}",
        "group": GROUP,
        "level": "optional",
        "features": [],
        "outcome": outcome,
        "ratio": None,
        "verdicts": {},
        "message": message,
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
