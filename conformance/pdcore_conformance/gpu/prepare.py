"""Prepare a checkout for a machine with a GPU, on one that has a network.

::

    python -m pdcore_conformance.gpu.prepare

It writes the folder ``gpu-prepared`` in the root of the checkout, which git ignores and which goes
to the machine with the code: the wheels that the machine may lack, the commit of the code, the
lists of the suite's cases, and the compiled CUDA kernels of CuPy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from pdcore.errors import Exit

from ..record import writing as record
from ..runner import child
from ..runner.watching import WatchedProcess
from .command import TARGETS
from .prepared import FOLDER, NAMES, ROOT, tree

__all__ = ["compile_kernels", "main"]

#: The versions of the wheels, those of the tests.
PINS = ("tests", "numpy")
#: Seconds to list the cases of a backend.
PATIENCE = 300.0


def main(arguments: list[str] | None = None) -> int:
    """Write the folder; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pdcore_conformance.gpu.prepare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--python", default="3.12", help="of the machine (default: %(default)s)")
    options = parser.parse_args(arguments)
    commit, dirty = record.revision()
    if commit is None or dirty:
        state = "the code has changes" if dirty else f"{ROOT} is no git checkout"
        print(f"prepare: {state}: commit first, so that records name a commit", file=sys.stderr)
        return int(Exit.USAGE)
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "wheels").mkdir(parents=True)
    if status := _download(FOLDER / "wheels", options.python):
        return status
    _write("commit", {"commit": commit, "tree": tree()})
    _write(
        "cases", {target: names for name in TARGETS if (names := _cases(target := f"{name}:cuda"))}
    )
    compile_kernels(FOLDER / "cubins")
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER}: {size / 1e6:.1f} MB for commit {commit[:10]} on Python {options.python}")
    return int(Exit.DONE)


def _download(folder: Path, python: str) -> int:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--python-version", python]
    command += [f"--platform=manylinux{kind}_x86_64" for kind in ("2014", "_2_17", "_2_28")]
    command += [f"--constraint={ROOT / 'constraints' / pin}.txt" for pin in PINS]
    return subprocess.call([*command, *NAMES])


def _cases(target: str) -> list[str]:
    """List the cases of the core level of a target; its device need not be here."""
    options = {"backend": target, "level": "core", "collect_only": True}
    with WatchedProcess(child.__name__, options) as process:
        process.wait(PATIENCE)
        process.stop()
        process.journal.read()
        names = [case["id"] for case in process.journal.planned]
        if not names:
            print(f"prepare: no cases of {target}: {process.printed()}", file=sys.stderr)
        return names


def compile_kernels(folder: Path) -> None:
    """Compile the CUDA kernels, where CuPy and NVRTC are here; else the machine compiles them."""
    try:
        from cupy.cuda import nvrtc

        version = nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        print(f"prepare: no compiled kernels: {error}", file=sys.stderr)
        return
    from pdcore_backends.cupy import cubins

    from .kernels import ARCHITECTURE, kernels

    found = kernels()
    print(f"compiling {len(found)} kernels by NVRTC {'.'.join(map(str, version))}, some minutes")
    cubins.save(folder, found, ARCHITECTURE)


def _write(name: str, content: object) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=0), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
