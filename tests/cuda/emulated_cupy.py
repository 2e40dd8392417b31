"""The CuPy backend's kernels and launch code on NumPy arrays, by the emulator of tests/cuda_cpu.

`python tests/cuda/emulated_cupy.py --level core` runs the conformance suite on it; with
`--level all` and `--dtype bfloat16`, all cases in that dtype; with `--quick`, some cases.
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
from importlib.resources import files
from typing import Any, ClassVar

import cuda_on_cpu

import pdcore
from pdcore.backend import SilentBackend
from pdcore_backends.cupy import INFO
from pdcore_backends.cupy.cubins import FLAGS as OPTIONS
from pdcore_backends.cupy.kernel_backend import KernelBackend
from pdcore_backends.cupy.launches import Limits, Usage
from pdcore_backends.cupy.runtime import SHARED, Kernel
from pdcore_conformance.frameworks.on_numpy import NumpyFramework
from pdcore_conformance.judge.judging import DTYPES
from pdcore_conformance.runner.conforming import conform, list_cases

NAME = "cupy_emulated"

#: Cases of 8,192 rows by 8,192 keys, which take minutes each. The memory of contractions by scores
#: is measured with a window, whose tiles are few, and that of features as it is.
SLOW = re.compile(r"memory::\w+\[(softmax|causal|bn|sh\(2\))-")
#: Cases of long sequences, and those whose calls need many programs.
NIGHTLY = ("memory::", "properties::", "axes::combination")

_BLOCKS = "lead=1-heads=4-rows=130-keys=260-dim=16-value_dim=16"
_WINDOW = "lead=1-rows=130-keys=260-dim=16-value_dim=16-offset=sequence"
_PREFIX = "lead=1-heads=1-key_heads=1-rows=65-keys=65-dim=4-value_dim=4"
_16_BITS = "lead=1-heads=8-rows=33-keys=260-dim=64-value_dim=64"
_GROUPS = "lead=1-heads=8-key_heads=4-rows=33-keys=130-dim=64-value_dim=64"
_DECODED = "heads=16-rows=1-keys=257-dim=64-value_dim=64-key_mask=right-offset=end"

#: Cases by which `--quick` runs every kernel, most of them over several blocks.
KERNELS = (
    f"blocks::bias_over_blocks[softmax-float32-{_BLOCKS}-bias=strided]",
    f"blocks::groups_add_up_over_blocks[causal+linear-float32-{_BLOCKS}]",
    f"blocks::masks_over_blocks[bn-float32-{_BLOCKS}-mask=strided]",
    f"blocks::pools_over_blocks[bn+sh(1,4)-float32-{_BLOCKS}-key_mask=holes]",
    f"blocks::prefixes_over_blocks[causal+bn(statistics=prefix)-float32-{_PREFIX}]",
    f"blocks::sixteen_bits_over_blocks[causal-bfloat16-{_16_BITS}]",
    f"blocks::sixteen_bits_over_blocks[sh(1,2)-float16-{_16_BITS}]",
    f"blocks::support_over_blocks[sparse(70,3)-float32-{_WINDOW}]",
    "lse::lse_has_every_row_constant[random_features(count=16)-float32]",
    "models::heads_are_wide[bn-bfloat16-lead=1-rows=65-keys=257-dim=128-value_dim=128]",
    f"models::many_query_heads_share_a_key_head[bn+sh(1,1,2,2)-float32-{_GROUPS}]",
    f"models::one_query_is_decoded[causal-float32-lead=3-{_DECODED}]",
    f"models::one_query_is_decoded[sparse(100,0)-float32-lead=3-{_DECODED}]",
)


class EmulatedRuntime:
    """The emulator in the place of CuPy's runtime; records the launched kernels."""

    #: The names of the kernels that any runtime has launched, without arguments of templates.
    launched: ClassVar[set[str]] = set()

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
        module = cuda_on_cpu.RawModule(code, options=OPTIONS, name_expressions=(name,))
        kernel = module.get_function(name)
        if shared > SHARED:
            kernel.max_dynamic_shared_size_bytes = shared

        def launch(*arguments: Any, **keywords: Any) -> None:
            self.launches.append(name)
            self.launched.add(name.partition("<")[0])
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


def quick_cases() -> list[str]:
    """Return the first case of each kind of level core, but for `NIGHTLY`, and `KERNELS`."""
    first: dict[str, str] = {}
    for name in list_cases(NAME, level="core"):
        first.setdefault(name.partition("[")[0], name)
    return [name for name in first.values() if not name.startswith(NIGHTLY)] + [*KERNELS]


def kernel_names() -> set[str]:
    """Return the names of the kernels in the sources of the backend."""
    named = re.compile(r"__global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(")
    sources = (files("pdcore_backends.cupy") / "kernels").iterdir()
    return {name for source in sources for name in named.findall(source.read_text("utf-8"))}


def main() -> int:
    """Run the conformance suite on the emulated CuPy backend."""
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
    parser.add_argument(
        "--quick", action="store_true", help="a case of each kind, and each kernel over blocks"
    )
    parser.add_argument("--report")
    options = parser.parse_args()
    register()
    cases = list(options.case)
    if options.quick:
        cases += quick_cases()
    elif options.dtype or not cases:
        named = re.compile(rf"\b({'|'.join(options.dtype)})\b")
        listed = list_cases(NAME, level=options.level, grid=options.grid)
        cases += [name for name in listed if not SLOW.match(name) and named.search(name)]
    # Every new call takes a compilation by g++, as it does where the library compiles.
    NumpyFramework.compiles = True
    level = "all" if options.quick else options.level
    run, code = conform(NAME, level=level, grid=options.grid, cases=cases, report=options.report)
    if run is not None:
        print(run["counts"], f"{run['seconds']:.0f} s")
        for dtype in DTYPES:
            outcomes = Counter(c["outcome"] for c in run["cases"] if dtype in c["features"])
            if outcomes:
                print(f"{dtype}: {', '.join(f'{n} {name}' for name, n in outcomes.items())}")
        for case in run["cases"]:
            if case["outcome"] in ("failed", "error"):
                print(case["id"], case["message"], sep="\n  ")
    if options.quick and (missing := kernel_names() - EmulatedRuntime.launched):
        print(f"no case launches {', '.join(sorted(missing))}: name one in KERNELS")
        return 1
    return code


if __name__ == "__main__":
    import emulated_cupy  # the backend is loaded by the name of this module

    sys.exit(emulated_cupy.main())
