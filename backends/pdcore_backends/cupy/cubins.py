"""Kernels that were compiled before, in a folder that the variable `FOLDER` names.

CuPy keeps the kernels that it compiled, but under keys in which the paths of its installation are,
so its cache cannot be made on another machine. These binaries can: NVRTC compiles without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .runtime import OPTIONS

__all__ = ["FLAGS", "FOLDER", "Cubin", "assemble", "find", "save"]

#: The variable with the folder.
FOLDER = "PDCORE_CUPY_CUBINS"
#: All options with which CuPy compiles the kernels. By ``-ftz=true`` float32 arithmetic takes
#: subnormal numbers, those below 1.2e-38, for 0, and gives 0 in their place.
FLAGS = (*OPTIONS, "-ftz=true", "--device-as-default-execution-space")
_SYMBOLS = "symbols.json"


class Cubin(NamedTuple):
    """A compiled kernel: where its binary is, and its name there."""

    path: Path
    symbol: str


def assemble(code: str, name: str, architecture: str, *options: str) -> tuple[bytes, str, str]:
    """Compile a kernel by NVRTC for an architecture such as ``"sm_90"``, as CuPy does.

    Returns
    -------
    cubin : bytes
    symbol : str
        The name of the kernel in the binary.
    log : str
        What the compiler printed.

    Raises
    ------
    cupy.cuda.compiler.CompileException
        Where the code is wrong; its text is the compiler's.
    """
    from cupy.cuda import compiler, nvrtc

    flags = (*FLAGS, f"-arch={architecture}", *options)
    program = nvrtc.createProgram(code, "kernel.cu", (), ())
    try:
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError:
            log = nvrtc.getProgramLog(program)
            raise compiler.CompileException(log, code, name, flags) from None
        cubin: bytes = nvrtc.getCUBIN(program)
        return cubin, str(nvrtc.getLoweredName(program, name)), str(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def _key(code: str, name: str, architecture: str) -> str:
    text = repr((FLAGS, architecture, name, code))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def save(folder: Path, kernels: list[tuple[str, str]], architecture: str) -> None:
    """Compile kernels, each a source and a name, on all cores, into a folder."""
    from concurrent.futures import ThreadPoolExecutor

    def compile_(kernel: tuple[str, str]) -> tuple[str, str]:
        cubin, symbol, _ = assemble(*kernel, architecture)
        key = _key(*kernel, architecture)
        (folder / f"{key}.cubin").write_bytes(cubin)
        return key, symbol

    folder.mkdir(parents=True, exist_ok=True)
    # The first compilation loads the libraries of the compiler, which two threads cannot do.
    symbols = dict(map(compile_, kernels[:1]))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        symbols |= threads.map(compile_, kernels[1:])
    (folder / _SYMBOLS).write_text(json.dumps(symbols, indent=0), encoding="utf-8")


def find(code: str, name: str, architecture: str) -> Cubin | None:
    """Return the binary of a kernel, None where the folder has none or is not set."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    key = _key(code, name, architecture)
    symbol = _symbols(folder).get(key)
    return None if symbol is None else Cubin(Path(folder) / f"{key}.cubin", symbol)


@cache
def _symbols(folder: str) -> dict[str, str]:
    """Return the names of the kernels in the folder, by their keys."""
    try:
        return dict(json.loads((Path(folder) / _SYMBOLS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{FOLDER} is {folder!r}, which has no {_SYMBOLS}; expected a folder of kernels that "
            "`python -m pdcore_conformance.gpu.prepare` wrote; unset the variable to compile them"
        ) from None
