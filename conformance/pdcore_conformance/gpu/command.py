"""Everything that needs a GPU, by one command on a machine whose Python has the frameworks.

::

    python -m pdcore_conformance.gpu --out gpu-records

It installs nothing. First it judges the numerics of every backend, each in its own processes, all
at the same time. Then it checks the CUDA kernels of the backends that have some: every wrapper of
a PTX instruction bit by bit, and small calls under compute-sanitizer where that is on the path.
Then it measures speed, one backend after another, of the backends that failed no case. Each
stage's record is written when the stage ends; ``--resume`` continues an interrupted run of the
same commit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from pdcore.errors import Exit

from .session import Session

__all__ = ["TARGETS", "main"]

#: The backends that are judged by default.
TARGETS = ("torch", "jax", "cupy")
#: The modules without which the command cannot run.
NEEDED = (
    "numpy",
    "pluggy",
    "array_api_compat",
    "pytest",
    "hypothesis",
    "autograd",
    "msgspec",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, see `pdcore.cli.Exit`."""
    options = _parser().parse_args(arguments)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"gpu: not installed: {', '.join(missing)}", file=sys.stderr)
        return int(Exit.MISSING)
    from pdcore.plugins import registry as plugins

    names = [name for text in options.only or TARGETS for name in text.split(",")]
    known = plugins.registered()
    for name in names:
        if name not in known:
            print(
                f"gpu: --only: unknown backend {name!r}; expected some of {', '.join(known)}",
                file=sys.stderr,
            )
            return int(Exit.USAGE)
    if options.device == "cpu" and not options.only:
        names = [name for name in names if "cpu" in known[name].devices]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu: --out: {options.out}: {error.strerror}", file=sys.stderr)
        return int(Exit.OUTPUT)
    with Session([f"{name}:{options.device}" for name in names], options) as session:
        return int(session.run())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pdcore_conformance.gpu",
        description="Judge and measure the backends on this machine's GPU; installs nothing.",
        epilog="Exit codes: 0 done; 1 not all was reached; 5 no GPU, or a framework without one; "
        "7 a case fails; 9 a package is missing.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-records"),
        metavar="FOLDER",
        help="where the records go (default: %(default)s)",
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        default=480.0,
        metavar="SECONDS",
        help="start nothing new after this time (default: %(default)g)",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME,...",
        help=f"only these backends (default: {','.join(TARGETS)})",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what an earlier run of this commit has finished"
    )
    parser.add_argument(
        "--grid",
        choices=("quick", "full"),
        default="quick",
        help="sizes, dtypes and shapes (default: quick)",
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command itself")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="only this case; may be given several times",
    )
    parser.add_argument("--no-speed", action="store_true", help="numerics only")
    parser.add_argument(
        "--allow-missing", action="store_true", help="succeed where a backend is not available here"
    )
    return parser
