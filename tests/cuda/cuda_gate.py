"""The compile gate: registers, spills and shared memory of every kernel, by NVRTC without a GPU.

`python tests/cuda/cuda_gate.py` writes the table of docs/cuda-kernels.md again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from pdcore_backends.cupy import cubins, feature_programs
from pdcore_backends.cupy.columns import RowProgram, instances
from pdcore_backends.cupy.feature_programs import FeatureProgram
from pdcore_backends.cupy.programs import COLUMNS, Program, memory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cuda-kernels.md"
ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
SCALARS = ("float", "double")
TEMPLATES = (
    "scores_forward<{}>",
    "scores_rows<{}>",
    "scores_keys<{}, false>",
    "scores_keys<{}, true>",
)
FEATURES = (
    "features_forward<{}>",
    "features_rows<{}>",
    "features_keys<{}, false>",
    "features_keys<{}, true>",
)
STATES = (
    "features_highest",
    "features_states<false>",
    "features_states<true>",
    "features_scan<0>",
    "features_scan<1>",
    "features_scan<2>",
)
#: A block has 256 threads, and a multiprocessor 65,536 registers.
MOST = 255
_ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<scalar>\w+) \| (?P<cells>[^|]*\|.*) \|$", re.M)
_START, _END = "<!-- written by tests/cuda/cuda_gate.py -->\n", "<!-- end -->\n"

Key = TypeVar("Key", bound=Hashable)
Compiled = TypeVar("Compiled")


class Usage(NamedTuple):
    """The resources of a kernel: registers per thread, bytes spilled, shared memory per block."""

    registers: tuple[int, ...]  # by architecture
    spilled: int
    shared: int


def kernels() -> list[tuple[str, str]]:
    """List every instantiation that a launch may use, with its scalar type."""
    names = [name.format(columns) for name in TEMPLATES for columns in COLUMNS]
    names += ["scores_bias", "scores_delta", *STATES]
    names += [name.format(columns) for name in FEATURES for columns in feature_programs.COLUMNS]
    return [*((name, scalar) for name in names for scalar in SCALARS), *row_kernels()]


def row_kernels() -> list[tuple[str, str]]:
    """List the kernels over rows; those with float sums are also compiled for 16-bit arrays."""
    by_dtype = [
        (instances(dtype), scalar)
        for dtype, scalar in (
            ("float32", "float"),
            ("float64", "double"),
            ("float16", "float"),
            ("bfloat16", "float"),
        )
    ]
    listed = [(names[kernel], scalar) for kernel in by_dtype[0][0] for names, scalar in by_dtype]
    return list(dict.fromkeys(listed))


def program_of(name: str, scalar: str) -> Program | RowProgram:
    """Return the program of a kernel."""
    if (name, scalar) in row_kernels():
        return RowProgram(scalar)
    return FeatureProgram(scalar, "features") if name.startswith("features") else Program(scalar)


def usage(name: str, scalar: str) -> Usage:
    """Compile a kernel for every architecture, and return its resources."""
    program = program_of(name, scalar)
    columns = int((re.search(r"<(\d+)", name) or [0, 32])[1])
    static = isinstance(program, RowProgram) or name in (*STATES, "scores_delta")
    dynamic = 0 if static else memory(scalar, columns)
    results = [compiled(program.text(name), name, arch) for arch in ARCHITECTURES]
    registers, spilled, declared = zip(*results, strict=True)
    return Usage(registers, sum(spilled), dynamic + max(declared))


def compiled(code: str, name: str, architecture: str) -> tuple[int, int, int]:
    """Return registers, bytes spilled, and bytes of shared memory that the kernel declares.

    The result is cached in the folder of the emulator's builds, by the hash of all inputs.
    """
    from cuda_on_cpu.build import cache_folder
    from cupy.cuda import nvrtc

    key = repr((nvrtc.getVersion(), cubins.FLAGS, architecture, name, code)).encode()
    cached = cache_folder() / f"usage-{hashlib.sha256(key).hexdigest()[:24]}.json"
    if cached.exists():
        registers, spilled, declared = json.loads(cached.read_text(encoding="utf-8"))
        return registers, spilled, declared
    resources, _ = assembled(code, name, architecture)
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(resources), encoding="utf-8")
    temporary.replace(cached)
    return resources


def assembled(code: str, name: str, architecture: str) -> tuple[tuple[int, int, int], bytes]:
    """Return registers, bytes spilled and shared memory declared, and the cubin."""
    cubin, _, log = cubins.assemble(code, name, architecture, "--ptxas-options=-v")
    [registers] = re.findall(r"Used (\d+) registers", log)
    spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", log)))
    declared = sum(map(int, re.findall(r"(\d+) bytes smem", log)))
    return (int(registers), spilled, declared), cubin


def measured() -> dict[tuple[str, str], Usage]:
    """Compile every kernel, on two cores."""
    return on_two_cores(lambda key: usage(*key), kernels())


def on_two_cores(compile_: Callable[[Key], Compiled], keys: Sequence[Key]) -> dict[Key, Compiled]:
    """Compile every key in two threads."""
    first, *rest = keys
    # The first compilation loads the libraries of the compiler, which two threads cannot do.
    results = {first: compile_(first)}
    with ThreadPoolExecutor(2) as threads:
        results |= zip(rest, threads.map(compile_, rest), strict=True)
    return results


def written() -> dict[tuple[str, str], Usage]:
    """Return the table of the page."""
    rows = {}
    page = PAGE.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    for row in _ROW.finditer(page):
        cells = row["cells"].replace(",", "").split("|")
        *registers, spilled, shared = map(int, cells)
        rows[row["name"], row["scalar"]] = Usage(tuple(registers), spilled, shared)
    return rows


def table(usages: dict[tuple[str, str], Usage]) -> str:
    """Return the usages as a Markdown table."""
    heads = [
        "kernel",
        "scalar",
        *(f"registers, {a}" for a in ARCHITECTURES),
        "bytes spilled",
        "shared memory, bytes",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for (name, scalar), use in usages.items():
        cells = [*map(str, use.registers), str(use.spilled), f"{use.shared:,}"]
        lines.append(f"| `{name}` | {scalar} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table of the page."""
    write(_START, _END, table(measured()))


def write(start: str, end: str, text: str) -> None:
    """Replace the text of the page between two markers."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(start)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
