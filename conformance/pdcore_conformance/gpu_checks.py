"""What only the GPU can tell of a backend's own CUDA kernels, beside the numbers of the suite.

::

    python -m pdcore_conformance.gpu_checks cupy:cuda

checks every wrapper of PTX against what it has to give, and runs small calls under the memory and
race checkers of NVIDIA's compute-sanitizer, where that is on the path. Each is a case of the
record.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gpu_wrappers import Check
    from .record import Case, Outcome

__all__ = ["BACKENDS", "GROUP", "TOOLS", "cases", "is_check", "is_checked", "main", "small_calls"]

#: The backends whose kernels these are.
BACKENDS = ("cupy",)
#: Of the cases, in the record.
GROUP = "device"
#: Of compute-sanitizer.
TOOLS = ("memcheck", "racecheck")
#: Seconds for one tool, which makes a kernel tens of times as slow.
PATIENCE = 120.0
#: Its exit code where the tool has found something.
FOUND = 86

#: A way through every kernel each, a tile and a rest long: spec, dtype and options.
CALLS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("causal+sh(1,2)", "float32", {}),
    ("softmax", "float16", {"bias": (70, 83)}),
    ("sparse(20,3)", "bfloat16", {}),
    ("bn", "float32", {}),
    ("linear+sparse(9,2)", "float64", {}),
    ("polynomial", "float32", {"key_mask": (1, 83)}),
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
    found = list(cases(target, PATIENCE * len(TOOLS)))
    for case in found:
        print(f"{case['outcome']}: {case['id']}: {case['message'] or ''}")
    return int(any(case["outcome"] in ("failed", "error") for case in found))


def cases(target: str, seconds: float) -> Iterator[Case]:
    """Check everything, with so many seconds for all of the sanitizer."""
    yield from wrapper_cases()
    for tool in TOOLS:
        yield _case(f"compute-sanitizer[{tool}]",
                    partial(_sanitized, tool, target, seconds / len(TOOLS)))  # fmt: skip


def wrapper_cases() -> Iterator[Case]:
    """Check each wrapper that the device has."""
    from .gpu_wrappers import checks, difference

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

    from .gpu_wrappers import checks, source

    capability = int(cupy.cuda.Device().compute_capability)
    names = [check.kernel for check in checks() if check.capability <= capability]
    module = cupy.RawModule(code=source(), options=("-std=c++17",),
                            name_expressions=tuple(dict.fromkeys(names)))  # fmt: skip

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        made = cupy.empty(shape, dtype)
        made.data.memset(0xFF, made.nbytes)
        return made

    return {"module": module, "capability": capability, "array": cupy.asarray, "empty": empty,
            "host": cupy.asnumpy}  # fmt: skip


def _sanitized(tool: str, target: str, seconds: float) -> tuple[Outcome, str | None]:
    """Make the small calls under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not claimed", "compute-sanitizer is not on the path; it comes with the CUDA toolkit"
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5",
               sys.executable, "-m", "pdcore_conformance.gpu_checks", target, "small"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False,
                              env=dict(os.environ))  # fmt: skip
    except subprocess.TimeoutExpired:
        return "not claimed", f"compute-sanitizer --tool {tool} was not through in {seconds:.0f} s"
    text = " ".join((done.stdout + done.stderr).split())[-600:]
    if done.returncode == FOUND:
        return "failed", text
    if done.returncode or " calls" not in done.stdout:
        return "error", f"exit code {done.returncode}: {text}"
    return "passed", None


def small_calls(target: str) -> int:
    """Make each of `CALLS` forward and backward, with memory that is allocated for each array."""
    import numpy as np

    from pdcore import attention_vjp

    from .calls import dtype_of
    from .plugin import parse_backend
    from .subject import Subject

    name, device = parse_backend(target)
    subject = Subject(name, device)
    rng = np.random.default_rng(0)
    count = 0
    with subject.framework.unpooled():
        for spec, dtype, options in CALLS:
            if not subject.claims(dtype):
                continue

            def given(*shape: int, dtype: str = dtype) -> Any:
                x = rng.standard_normal(shape).astype(dtype_of(dtype))
                return subject.framework.asarray(x, subject.device)

            more: dict[str, Any] = {}
            if "bias" in options:
                more["bias"] = given(*options["bias"])
            if "key_mask" in options:
                kept = rng.random(options["key_mask"]) < 0.7
                more["key_mask"] = subject.framework.asarray(kept, subject.device)
            q, k, v = given(1, 4, 70, 40), given(1, 2, 83, 40), given(1, 2, 83, 24)
            out, _, vjp = attention_vjp(q, k, v, spec, backend=name, **more)
            subject.framework.synchronize(vjp(out))
            count += 1
    return count


def _case(name: str, check: Callable[[], tuple[Outcome, str | None]]) -> Case:
    """Make a case of the record; what goes wrong is one, too."""
    began = time.perf_counter()
    outcome: Outcome
    try:
        outcome, message = check()
    except Exception as error:  # noqa: BLE001 - a check must not keep the others from running
        outcome, message = "error", f"{type(error).__name__}: {error}"
    return {
        "id": f"{GROUP}::{name}", "group": GROUP, "level": "optional", "features": [],
        "outcome": outcome, "ratio": None, "verdicts": {}, "message": message,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
