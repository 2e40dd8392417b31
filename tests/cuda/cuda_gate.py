"""The compile gate: what NVRTC makes of every kernel, on a machine without a GPU.

`python tests/cuda/cuda_gate.py` writes the table of docs/cuda-kernels.md anew.
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

from pdcore_backends.cupy import feature_programs
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
Found = TypeVar("Found")


class Usage(NamedTuple):
    """What a kernel takes of a multiprocessor: registers of a thread, bytes of a block."""

    registers: tuple[int, ...]  # by architecture
    spilled: int
    shared: int


def kernels() -> list[tuple[str, str]]:
    """List every instantiation that a launch can ask for, with its scalar."""
    names = [name.format(columns) for name in TEMPLATES for columns in COLUMNS]
    names += ["scores_bias", "scores_delta", *STATES]
    names += [name.format(columns) for name in FEATURES for columns in feature_programs.COLUMNS]
    return [*((name, scalar) for name in names for scalar in SCALARS), *row_kernels()]


def row_kernels() -> list[tuple[str, str]]:
    """List the kernels of rows; what reads them reads 16 bits too where sums are in float."""
    by_dtype = [
        (instances(dtype), scalar)
        for dtype, scalar in (
            ("float32", "float"),
            ("float64", "double"),
            ("float16", "float"),
            ("bfloat16", "float"),
        )
    ]
    found = [(names[kernel], scalar) for kernel in by_dtype[0][0] for names, scalar in by_dtype]
    return list(dict.fromkeys(found))


def program_of(name: str, scalar: str) -> Program | RowProgram:
    """Give the program of the table's line for a kernel."""
    if (name, scalar) in row_kernels():
        return RowProgram(scalar)
    return FeatureProgram(scalar, "features") if name.startswith("features") else Program(scalar)


def usage(name: str, scalar: str) -> Usage:
    """Compile a kernel for every architecture, and read what the assembler says."""
    program = program_of(name, scalar)
    columns = int((re.search(r"<(\d+)", name) or [0, 32])[1])
    alone = isinstance(program, RowProgram) or name in (*STATES, "scores_delta")
    dynamic = 0 if alone else memory(scalar, columns)
    found = [compiled(program.text(name), name, arch) for arch in ARCHITECTURES]
    registers, spilled, declared = zip(*found, strict=True)
    return Usage(registers, sum(spilled), dynamic + max(declared))


def compiled(code: str, name: str, architecture: str) -> tuple[int, int, int]:
    """Give registers, bytes spilled, and bytes of shared memory that the kernel declares.

    They are kept beside the emulator's builds by all that matters.
    """
    from cuda_on_cpu.build import cache_folder
    from cupy.cuda import nvrtc

    key = repr((nvrtc.getVersion(), architecture, name, code)).encode()
    kept = cache_folder() / f"usage-{hashlib.sha256(key).hexdigest()[:24]}.json"
    if kept.exists():
        registers, spilled, declared = json.loads(kept.read_text(encoding="utf-8"))
        return registers, spilled, declared
    found, _ = assembled(code, name, architecture)
    kept.parent.mkdir(parents=True, exist_ok=True)
    whole = kept.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    whole.write_text(json.dumps(found), encoding="utf-8")
    whole.replace(kept)
    return found


def assembled(code: str, name: str, architecture: str) -> tuple[tuple[int, int, int], bytes]:
    """Give registers, bytes spilled and shared memory declared, and the cubin."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(code, "kernel.cu", (), ())
    try:
        nvrtc.addNameExpression(program, name)
        options = (f"--gpu-architecture={architecture}", "-std=c++17", "--ptxas-options=-v")
        try:
            nvrtc.compileProgram(program, options)
        finally:
            log = nvrtc.getProgramLog(program)
        cubin = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise AssertionError(f"{name} for {architecture}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)
    [registers] = re.findall(r"Used (\d+) registers", log)
    spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", log)))
    declared = sum(map(int, re.findall(r"(\d+) bytes smem", log)))
    return (int(registers), spilled, declared), cubin


def measured() -> dict[tuple[str, str], Usage]:
    """Compile all of them, on two cores."""
    return on_two_cores(lambda key: usage(*key), kernels())


def on_two_cores(compile_: Callable[[Key], Found], keys: Sequence[Key]) -> dict[Key, Found]:
    """Compile what the keys stand for."""
    first, *rest = keys
    found = {first: compile_(first)}  # the compiler loads its libraries, which two threads cannot
    with ThreadPoolExecutor(2) as threads:
        found |= zip(rest, threads.map(compile_, rest), strict=True)
    return found


def written() -> dict[tuple[str, str], Usage]:
    """Read the page's table."""
    found = {}
    page = PAGE.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    for row in _ROW.finditer(page):
        cells = row["cells"].replace(",", "").split("|")
        *registers, spilled, shared = map(int, cells)
        found[row["name"], row["scalar"]] = Usage(tuple(registers), spilled, shared)
    return found


def table(found: dict[tuple[str, str], Usage]) -> str:
    """Write what was measured as a table."""
    heads = [
        "kernel",
        "scalar",
        *(f"registers, {a}" for a in ARCHITECTURES),
        "bytes spilled",
        "shared memory, bytes",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for (name, scalar), use in found.items():
        cells = [*map(str, use.registers), str(use.spilled), f"{use.shared:,}"]
        lines.append(f"| `{name}` | {scalar} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table of the page anew."""
    write(_START, _END, table(measured()))


def write(start: str, end: str, text: str) -> None:
    """Put a table in its place on the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(start)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
