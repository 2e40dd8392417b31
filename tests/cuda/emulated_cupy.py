"""The CuPy backend's kernels and launch code on NumPy arrays, by the emulator of tests/cuda_cpu.

`python tests/cuda/emulated_cupy.py --level core` runs the conformance suite on it; with
`--level all` and `--dtype bfloat16`, all cases in that dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import cuda_on_cpu

import pdcore
from pdcore.backend import SilentBackend
from pdcore_backends.cupy import INFO
from pdcore_backends.cupy.kernel_backend import KernelBackend
from pdcore_backends.cupy.launches import Limits, Usage
from pdcore_backends.cupy.runtime import SHARED, Kernel

NAME = "cupy_emulated"

#: Parts of the ids of cases with long sequences, and of combinations and forms of all arguments.
LONG = (
    "memory::",
    "models::",
    "combination[",
    "nan_reaches",
    "arrays_may_change",
    "offset_has_any",
    "::any_call",
)


class EmulatedRuntime:
    """The emulator in the place of CuPy's runtime; records the launched kernels."""

    def __init__(self, capability: int = 90) -> None:
        self._capability = capability
        self.launches: list[str] = []
        self.captured = False
        self.asked, self.shared = 0, 227 * 1024

    def on(self, array: Any) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def device(self) -> int:
        return 0

    def capability(self, device: str) -> int:
        return self._capability

    def capturing(self) -> bool:
        return self.captured

    def compile(self, code: str, name: str, shared: int = 0) -> Kernel:
        options = ("-std=c++17",)
        module = cuda_on_cpu.RawModule(code, options=options, name_expressions=(name,))
        kernel = module.get_function(name)
        if shared > SHARED:
            kernel.max_dynamic_shared_size_bytes = shared

        def launch(*arguments: Any, **keywords: Any) -> None:
            self.launches.append(name)
            kernel(*arguments, **keywords)

        return launch

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def structure(self, value: Any, arrays: Mapping[int, Any]) -> Any:
        return cuda_on_cpu.Structure(value, arrays)

    def usage(self, kernel: Kernel) -> Usage:
        return Usage(registers=64, threads=1024, shared=0)

    def limits(self) -> Limits:
        self.asked += 1
        return Limits(1024, 65536, self.shared, (2**31 - 1, 65535, 65535))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return cuda_on_cpu.empty(shape, dtype)


class EmulatedBackend(SilentBackend, KernelBackend):
    """`CupyBackend` with NumPy arrays and the emulated runtime."""

    info = replace(
        INFO,
        name=NAME,
        library="numpy",
        load=f"{__name__}:EmulatedBackend",
        requires=("numpy",),
        devices=("cpu",),
    )

    def __init__(self, runtime: EmulatedRuntime | None = None) -> None:
        KernelBackend.__init__(self, runtime or EmulatedRuntime())


def register() -> None:
    """Register the backend in this process."""
    pdcore.register_backend(EmulatedBackend.info)


def main() -> int:
    """Run the conformance suite on the emulated CuPy backend."""
    from pdcore_conformance.judge.judging import DTYPES
    from pdcore_conformance.runner.conforming import conform, list_cases

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--level", choices=("core", "all"), default="core")
    parser.add_argument("--grid", choices=("quick", "full"), default="quick")
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        default=[],
        help="cases of the level in this dtype only",
    )
    parser.add_argument("--quick", action="store_true", help="leave out long and random cases")
    parser.add_argument("--report")
    options = parser.parse_args()
    register()
    cases = list(options.case)
    if options.dtype or not cases:
        named = re.compile(rf"\b({'|'.join(options.dtype)})\b")
        listed = list_cases(NAME, level=options.level, grid=options.grid)
        # The emulator takes minutes for these; `conform_emulated` runs all but those of memory.
        slow = LONG if options.quick else ("memory::",)
        listed = [name for name in listed if not any(text in name for text in slow)]
        cases += [name for name in listed if not options.dtype or named.search(name)]
    run, code = conform(
        NAME, level=options.level, grid=options.grid, cases=cases, report=options.report
    )
    if run is not None:
        print(run["counts"], f"{run['seconds']:.0f} s")
        for dtype in DTYPES:
            outcomes = Counter(c["outcome"] for c in run["cases"] if dtype in c["features"])
            if outcomes:
                print(f"{dtype}: {', '.join(f'{n} {name}' for name, n in outcomes.items())}")
        for case in run["cases"]:
            if case["outcome"] in ("failed", "error"):
                print(case["id"], case["message"], sep="\n  ")
    return code


if __name__ == "__main__":
    import emulated_cupy  # the backend is loaded by the name of this module

    sys.exit(emulated_cupy.main())
