"""Compile CUDA sources with g++; builds are cached by the hash of their inputs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import compiler
from .settings import Settings
from .source import translate

__all__ = ["build", "flushes", "load"]

NATIVE = Path(__file__).parent / "native"
_COMMON = ("-std=c++17", "-fPIC", "-fno-strict-aliasing", "-fstack-clash-protection", "-g1")
_KERNEL_FLAGS = {
    # Uninitialised variables hold a pattern that changes the result.
    "": ("-O2", "-ftrivial-auto-var-init=pattern"),
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"),
    "thread": ("-O1", "-fsanitize=thread"),
}
_RUNTIME_FLAGS = {
    "": (),
    "address": ("-DCUDA_ON_CPU_ADDRESS",),
    "thread": ("-DCUDA_ON_CPU_THREAD",),
}
#: Options of NVRTC that do not change a build.
_NOTHING_HERE = re.compile(
    r"-?-(std=c\+\+(11|14|17)|arch=.*|gpu-architecture=.*|use_fast_math|ftz=.*|fmad=.*|lineinfo|"
    r"generate-line-info|maxrregcount=.*|ptxas-options=.*|w|default-device|"
    r"device-as-default-execution-space|"
    r"extra-device-vectorization|restrict|dopt=on)$"
)


def cache_folder() -> Path:
    """Return the folder of the builds: CUDA_ON_CPU_CACHE, or the user's cache."""
    if folder := os.environ.get("CUDA_ON_CPU_CACHE"):
        return Path(folder)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cuda_on_cpu"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _native_text() -> str:
    return "".join(path.read_text("utf-8") for path in sorted(NATIVE.iterdir()))


def _kept(name: str, arguments: Sequence[str], code: str = "") -> Path:
    """Compile to the file `name` of the cache, unless it exists."""
    target = cache_folder() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder, "built")
        if code:
            Path(folder, "kernel.cpp").write_text(code, "utf-8")
            arguments = [str(Path(folder, "kernel.cpp")), *arguments]
        compiler.run([*arguments, "-o", str(built)])
        built.replace(target)  # atomic, because two processes may build the same file
    return target


def _runtime(sanitize: str) -> Path:
    flags = [*_COMMON, "-O2", *_RUNTIME_FLAGS[sanitize]]
    key = _hash(compiler.version(), _native_text(), *flags)
    sources = [str(path) for path in sorted(NATIVE.glob("*.cpp"))]
    # Link all objects into one, so that the build of a kernel links a single file.
    unity = "".join(f'#include "{source}"\n' for source in sources)
    return _kept(f"runtime-{key}.o", [*flags, f"-I{NATIVE}", "-c"], unity)


def _options(options: Sequence[str]) -> list[str]:
    """Return the options of g++ for options of NVRTC."""
    kept: list[str] = []
    waiting = iter(options)
    for option in waiting:
        match = re.fullmatch(
            r"(-[DUI]|--(?:define-macro|undefine-macro|include-path)=)(.*)", option
        )
        if match:
            letter = {"--d": "-D", "--u": "-U", "--i": "-I"}.get(match[1][:3], match[1])
            value = match[2] or next(waiting, "")
            kept.append(letter + value)
        elif not _NOTHING_HERE.match(option):
            raise ValueError(f"options: {option!r} is not known to the emulator")
    return kept


def flushes(options: Sequence[str]) -> bool:
    """Check whether options of NVRTC flush subnormal float numbers to 0."""
    return any(re.fullmatch(r"-?-(ftz=true|use_fast_math)", option) for option in options)


def _kernels(names: Sequence[str]) -> str:
    return "".join(f"\nCUDA_ON_CPU_KERNEL({i}, {name})" for i, name in enumerate(names))


def build(code: str, names: Sequence[str], options: Sequence[str], use: Settings) -> Path:
    """Compile `code` for these kernels; return the library."""
    arch = f"-D__CUDA_ARCH__={use.compute_capability}0"
    flags = [*_COMMON, *_KERNEL_FLAGS[use.sanitize], arch, *_options(options)]
    flags += ["-include", str(NATIVE / "device.h"), "-w"]
    whole = f'#line 1 "kernel.cu"\n{translate(code)}{_kernels(names)}\n'
    included = ""
    if re.search(r"^\s*#\s*include\b", code, re.MULTILINE):
        # Preprocess, so that the hash includes the headers.
        included = compiler.run([*flags, "-E", "-x", "c++", "-"], whole)
    key = _hash(compiler.version(), _native_text(), included, whole, *flags)
    runtime = str(_runtime(use.sanitize))
    return _kept(f"kernel-{key}.so", [*flags, "-shared", runtime], whole)


def load(library: Path, sanitize: str) -> ctypes.CDLL:
    """Load a build; with a sanitizer, the library of the sanitizer must be loaded first."""
    if sanitize and compiler.sanitizer_library(sanitize) not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(
            f"sanitize={sanitize!r}: this process has not loaded the sanitizer's library; start "
            f"one with the variables of cuda_on_cpu.environment({sanitize!r})"
        )
    return ctypes.CDLL(str(library))
