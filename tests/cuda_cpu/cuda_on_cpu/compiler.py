"""g++, which builds kernels and has the sanitizers' libraries."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Sequence

__all__ = ["CompileError", "run", "sanitizer_library", "version"]


class CompileError(Exception):
    """The source is not C++ that the compiler takes; the message is the compiler's."""


def run(arguments: Sequence[str], code: str | None = None) -> str:
    """Run g++ with these arguments, and `code` as its input; return what it prints."""
    # A sanitizer that this process runs under is not the compiler's.
    variables = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        done = subprocess.run(
            ["g++", *arguments],
            input=code,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise RuntimeError("cuda_on_cpu needs g++ 12 or newer; install it") from None
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout


@functools.cache
def version() -> str:
    """Return what g++ says of itself; refuse a machine whose code the runtime does not know."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise RuntimeError(f"cuda_on_cpu runs on Linux x86_64, not {platform.platform()}")
    return run(["--version"])


@functools.cache
def sanitizer_library(sanitize: str) -> str:
    """Return the path of a sanitizer's library."""
    name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitize]
    found = run([f"-print-file-name={name}"]).strip()
    if "/" not in found:
        raise RuntimeError(f"g++ has no {name}; install it (Debian: libgcc-12-dev)")
    return os.path.realpath(found)
