"""Everything that needs a GPU, by one command on a machine whose Python has the frameworks.

::

    python conformance/pdcore_conformance/gpu --minutes 9

It installs nothing. It runs the stages of `pdcore_conformance.gpu.stages` in the order of their
worth, each for its share of the time, and packs the log, the record and all else that is worth
keeping into one archive, which is written again after each stage and when the command is ended.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pdcore.errors import Exit

from .prepared import name_commit

__all__ = ["TARGETS", "main"]

#: The backends that are judged by default.
TARGETS = ("torch", "jax", "cupy")


def main(arguments: Sequence[str] | None = None, carried: Sequence[str] = ()) -> int:
    """Run the command; return its exit code, see `pdcore.errors.Exit`.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words of the command line; those of the process by default.
    carried : sequence of str
        The distributions that were carried to the machine, for the log.
    """
    from .stages import STAGES

    options = _parser(list(STAGES)).parse_args(arguments)
    from pdcore.plugins import registry as plugins

    names = [name for text in options.only or TARGETS for name in text.split(",")]
    known = plugins.registered()
    if options.device == "cpu" and not options.only:
        names = [name for name in names if "cpu" in known[name].devices]
    for option, given, expected in (
        ("--only", names, known),
        ("--stages", options.stages, STAGES),
    ):
        for name in given:
            if name not in expected:
                print(
                    f"gpu: {option}: unknown {name!r}; expected some of {', '.join(expected)}",
                    file=sys.stderr,
                )
                return int(Exit.USAGE)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        options.archive = options.archive or options.folder.with_suffix(".tar.gz")
        options.archive.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu: {error.filename}: {error.strerror}", file=sys.stderr)
        return int(Exit.OUTPUT)
    unknown = name_commit()
    from .session import Session

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with Session([f"{name}:{options.device}" for name in names], options, list(carried)) as session:
        if unknown:
            session.log.say(f"the commit is unknown: {unknown}")
        return int(session.run())


def _parser(stages: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python conformance/pdcore_conformance/gpu",
        description="Judge and measure the backends on this machine's GPU; installs nothing.",
        epilog="Exit codes: 0 done; 1 not all was reached; 5 no GPU, or a framework without one; "
        "7 a case fails; 9 a package is missing.",
    )
    add = parser.add_argument
    add(
        "--minutes",
        type=float,
        default=9.0,
        help="the time for all stages together (default: %(default)g)",
    )
    add(
        "--stages",
        type=lambda text: text.split(","),
        default=list(stages),
        metavar="NAME,...",
        help=f"only these (default: {','.join(stages)})",
    )
    add(
        "--only",
        action="append",
        metavar="NAME,...",
        help=f"only these backends (default: {','.join(TARGETS)})",
    )
    add(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="in the stage `suite`, run this case; may be given several times",
    )
    add(
        "--folder",
        type=Path,
        default=Path("gpu-records"),
        help="where the log and the record go (default: %(default)s)",
    )
    add(
        "--archive",
        type=Path,
        metavar="FILE",
        help="the archive of the folder (default: FOLDER.tar.gz)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the log in the folder, if it is of this commit; what began there and did "
        "not end is not run again",
    )
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: try the command itself, without a GPU (default: %(default)s)",
    )
    return parser
