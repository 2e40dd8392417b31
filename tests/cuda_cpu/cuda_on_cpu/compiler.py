"""Run g++, which compiles kernels and has the libraries of the sanitizers."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Sequence

__all__ = ["CompileError", "run", "sanitizer_library", "version"]


class CompileError(Exception):
    """The source does not compile; the message is that of g++."""


def run(arguments: Sequence[str], code: str | None = None) -> str:
    """Run g++ with arguments, and `code` as its standard input; return its output."""
    # g++ must not run under the sanitizer of this process.
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
    """Return the version of g++; raise on a machine that the runtime does not support."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise RuntimeError(f"cuda_on_cpu runs on Linux x86_64, not {platform.platform()}")
    return run(["--version"])


@functools.cache
def sanitizer_library(sanitize: str) -> str:
    """Return the path of the library of a sanitizer."""
    name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitize]
    path = run([f"-print-file-name={name}"]).strip()
    if "/" not in path:
        raise RuntimeError(f"g++ has no {name}; install it (Debian: libgcc-12-dev)")
    return os.path.realpath(path)
