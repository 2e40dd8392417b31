"""The console script ``pdcore``; the commands are in `pdcore.commands`.

This module imports without the extra ``cli``, so that it can say what is missing.
"""

from __future__ import annotations

import sys
from enum import IntEnum

__all__ = ["EXTRA", "Exit", "main"]

#: What the extra ``cli`` brings, by import name.
EXTRA = ("matplotlib", "ml_dtypes", "rich", "safetensors", "typer")


class Exit(IntEnum):
    """Exit codes of the command line; 128 + n after signal n (130 after Ctrl-C)."""

    DONE = 0
    FAILURE = 1
    USAGE = 2
    INPUT = 3
    UNSUPPORTED = 4
    NO_BACKEND = 5
    OUTPUT = 6
    NUMERICS = 7
    UNMET = 8
    MISSING = 9

    @property
    def meaning(self) -> str:
        """What the code says, for the help."""
        return _MEANINGS[self]


_MEANINGS = {
    Exit.DONE: "done",
    Exit.FAILURE: "a defect of pdcore, or too little memory",
    Exit.USAGE: "usage: an unknown command, option, spec word or backend",
    Exit.INPUT: "a file cannot be read, or its arrays do not fit",
    Exit.UNSUPPORTED: "the spec or the named backend does not support it",
    Exit.NO_BACKEND: "no backend can run it",
    Exit.OUTPUT: "the result exists already or cannot be written",
    Exit.NUMERICS: "a case of the suite fails, numerics got worse, or a loss is not finite",
    Exit.UNMET: "a target is not met, with --strict, or speed or memory got worse",
    Exit.MISSING: "an optional package is not installed",
}


def main() -> None:
    """Run the command line; never returns."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if not optional(error):
            raise
        print(missing(error), file=sys.stderr)
        raise SystemExit(int(Exit.MISSING)) from None
    app(prog_name="pdcore")


def optional(error: ModuleNotFoundError) -> bool:
    """Whether what was not found belongs to the extra ``cli``."""
    return (error.name or "").partition(".")[0] in EXTRA


def missing(error: ModuleNotFoundError) -> str:
    """Say that an optional package is missing, and what installs it."""
    package = (error.name or "").partition(".")[0]
    return f"pdcore: {package} is not installed: pip install 'pdcore[cli]'"
