"""The compile gate for tensor cores: registers, spills, and the instructions that are in a cubin.

`python tests/cuda/cuda_gate_tensor_cores.py` writes its table of docs/cuda-kernels.md anew.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from cuda_gate import PAGE, assembled, compiled, on_two_cores, write

from pdcore_backends.cupy.programs import STORED, Program
from pdcore_backends.cupy.tensor_cores import WIDTHS, memory, pullback_memory

ARCHITECTURES = ("sm_80", "sm_90")
#: The opcodes of machine code of sm_80 and sm_90, the low 12 bits of an instruction of 128.
OPCODES = {"HMMA": 0x23C, "LDSM": 0x83B, "LDGSTS": 0xFAE}
_START, _END = (
    "<!-- written by tests/cuda/cuda_gate_tensor_cores.py -->\n",
    "<!-- end of tensor cores -->\n",
)
_ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<cells>[^|]*\|.*) \|$", re.M)


class Usage(NamedTuple):
    """What a kernel takes of a multiprocessor: registers of a thread, bytes of a block."""

    registers: tuple[int, ...]  # by architecture
    spilled: int
    shared: int


def kernels() -> list[str]:
    """List instantiations for arrays of bfloat16: D and Dv alike, and as far apart as can be."""
    ends = WIDTHS[0], WIDTHS[-1]
    pairs = [*((width, width) for width in WIDTHS), ends, ends[::-1]]
    both = [f"<{dim}, {value_dim}" for dim, value_dim in pairs]
    endings = {
        "scores_mma": "",
        "scores_mma_rows": ", ptx::bf16",
        "scores_mma_keys": ", ptx::bf16, ptx::bf16",
    }
    return [f"{name}{widths}{ending}>" for name, ending in endings.items() for widths in both]


def program(dtype: str = "bfloat16") -> Program:
    """Give the program of ``scale * s``."""
    return Program("float", stored=tuple((name, dtype) for name in STORED if name != "bias"))


def sizes(name: str) -> tuple[int, int]:
    """Read the columns of queries and of values."""
    dim, value_dim = map(int, re.findall(r"\d+", name)[:2])
    return dim, value_dim


def usage(name: str) -> Usage:
    """Compile a kernel for every architecture, and read what the assembler says."""
    found = [compiled(program().text(name), name, arch) for arch in ARCHITECTURES]
    shared = memory if name.startswith("scores_mma<") else pullback_memory
    return Usage(tuple(r for r, *_ in found), sum(s for _, s, _ in found), shared(*sizes(name)))


def measured() -> dict[str, Usage]:
    """Compile all of them, on two cores."""
    return on_two_cores(usage, kernels())


def instructions(name: str, architecture: str, dtype: str) -> dict[str, int]:
    """Count the instructions of `OPCODES` in a kernel's machine code."""
    _, cubin = assembled(program(dtype).text(name), name, architecture)
    code = b"".join(_texts(cubin))
    low = [word & 0xFFF for word, _ in struct.iter_unpack("<QQ", code)]
    return {word: low.count(opcode) for word, opcode in OPCODES.items()}


def _texts(cubin: bytes) -> list[bytes]:
    """Cut the sections of machine code out of a 64-bit ELF file."""
    [table] = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    label = sections[names][4]
    return [
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", label + name)
    ]


def written() -> dict[str, Usage]:
    """Read the page's table."""
    page = PAGE.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    found = {}
    for row in _ROW.finditer(page):
        *registers, spilled, shared = map(int, row["cells"].replace(",", "").split("|"))
        found[row["name"]] = Usage(tuple(registers), spilled, shared)
    return found


def main() -> None:
    """Write the table of the page anew."""
    heads = [
        "kernel",
        *(f"registers, {a}" for a in ARCHITECTURES),
        "bytes spilled",
        "shared memory, bytes",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, use in measured().items():
        cells = [*map(str, use.registers), str(use.spilled), f"{use.shared:,}"]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    write(_START, _END, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
