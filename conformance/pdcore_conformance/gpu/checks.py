"""What only the GPU can tell of a backend's own CUDA kernels, beside the numbers of the suite.

::

    python -m pdcore_conformance.gpu.checks cupy:cuda

checks every wrapper of PTX against what it has to give, and runs small calls under the memory and
race checkers of NVIDIA's compute-sanitizer, where that is on the path. Each is a case of the
record.
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
    from .wrappers import Check

__all__ = [
    "BACKENDS",
    "GROUP",
    "TOOLS",
    "cases",
    "is_check",
    "is_checked",
    "main",
    "small_calls",
    "unwind_when_ended",
]

#: The backends whose kernels these are.
BACKENDS = ("cupy",)
#: Of the cases, in the record.
GROUP = "device"
#: Of compute-sanitizer.
TOOLS = ("memcheck", "racecheck")
#: Seconds for one tool, which makes a kernel tens of times as slow.
PATIENCE = 240.0
#: Its exit code where the tool has found something.
FOUND = 86


class Small(NamedTuple):
    """A call that a sanitizer watches, of 70 queries and 83 keys: a tile and a rest.

    Attributes
    ----------
    spec, dtype : str
    widths : (int, int)
        Columns of queries and keys, and of values. They say whether tensor cores compute it.
    bias, key_mask : tuple of int, optional
        Their shapes.
    backward : bool
        Whether gradients are asked for; some kernels run only where they are not.
    """

    spec: str
    dtype: str
    widths: tuple[int, int] = (40, 24)
    bias: tuple[int, ...] | None = None
    key_mask: tuple[int, ...] | None = None
    backward: bool = True


#: A way through every kernel.
CALLS = (
    Small("causal+sh(1,2)", "float32"),
    Small("softmax", "float16", bias=(70, 83)),
    Small("sparse(20,3)", "bfloat16"),
    Small("bn", "float32"),
    Small("linear+sparse(9,2)", "float64"),
    Small("polynomial", "float32", key_mask=(1, 83)),
    Small("causal+sh(1,2)", "bfloat16", (64, 64)),
    Small("softmax", "float16", (128, 128), bias=(70, 83)),
    Small("bn", "bfloat16", (64, 64), backward=False),
    Small("linear", "float32"),
    Small("causal+linear", "float32"),
    Small("causal+random_features(8)", "float32"),
    Small("causal+bn(statistics=prefix)", "float32"),
)


def is_check(name: str) -> bool:
    """Whether a case is one of these, by its id."""
    return name.startswith(f"{GROUP}::")


def is_checked(target: str) -> bool:
    """Whether a target's kernels are among those that are checked."""
    return target.partition(":")[0] in BACKENDS


def main(target: str, what: str = "all") -> int:
    """Print every check; with ``"small"``, only make the calls that a sanitizer watches."""
    if what == "small":
        print(f"{small_calls(target)} calls")
        return 0
    unwind_when_ended()
    found = list(cases(target, PATIENCE * len(TOOLS)))
    for case in found:
        print(f"{case['outcome']}: {case['id']}: {case['message'] or ''}")
    return int(any(case["outcome"] in ("failed", "error") for case in found))


def unwind_when_ended() -> None:
    """Let SIGTERM leave as an exception does: what runs under a sanitizer has its own group."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def cases(target: str, seconds: float) -> Iterator[Case]:
    """Check everything, with so many seconds for all of the sanitizer."""
    yield from wrapper_cases()
    for tool in TOOLS:
        yield _case(
            f"compute-sanitizer[{tool}]", partial(_sanitized, tool, target, seconds / len(TOOLS))
        )


def wrapper_cases() -> Iterator[Case]:
    """Check each wrapper that the device has."""
    from .wrappers import checks, difference

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
            why = difference(check, **device)
            return ("failed", why) if why else ("passed", None)

        yield _case(f"ptx[{check.name}]", run)


def compiled() -> dict[str, Any]:
    """Compile the wrappers for CuPy's device, with what brings arrays there and back."""
    import cupy

    from .wrappers import checks, source

    capability = int(cupy.cuda.Device().compute_capability)
    names = [check.kernel for check in checks() if check.capability <= capability]
    module = cupy.RawModule(
        code=source(), options=("-std=c++17",), name_expressions=tuple(dict.fromkeys(names))
    )

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        made = cupy.empty(shape, dtype)
        made.data.memset(0xFF, made.nbytes)
        return made

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
        str(FOUND),
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
    if done.returncode == FOUND:
        return "failed", text
    if done.returncode or " calls" not in done.stdout:
        return "error", f"exit code {done.returncode}: {text}"
    return "passed", None


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command; what it has started, which holds the GPU, ends with it."""
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
    """Make each of `CALLS`, with memory that is allocated for each array; give their number."""
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

            def given(*shape: int, dtype: str = call.dtype) -> Any:
                x = rng.standard_normal(shape).astype(dtype_of(dtype))
                return subject.framework.asarray(x, subject.device)

            more: dict[str, Any] = {"backend": name}
            if call.bias is not None:
                more["bias"] = given(*call.bias)
            if call.key_mask is not None:
                kept = rng.random(call.key_mask) < 0.7
                more["key_mask"] = subject.framework.asarray(kept, subject.device)
            dim, value_dim = call.widths
            q, k, v = given(1, 4, 70, dim), given(1, 2, 83, dim), given(1, 2, 83, value_dim)
            if call.backward:
                out, _, vjp = attention_vjp(q, k, v, call.spec, **more)
                subject.framework.synchronize(vjp(out))
            else:
                subject.framework.synchronize(attention(q, k, v, call.spec, **more))
    return len(claimed)


def _case(name: str, check: Callable[[], tuple[Outcome, str | None]]) -> Case:
    """Make a case of the record; what goes wrong is one, too."""
    began = time.perf_counter()
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
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
