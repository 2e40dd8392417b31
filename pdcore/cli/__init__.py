"""The console script ``pdcore``; the application is `pdcore.cli.commands.app`.

This module imports without the extra ``cli``, so that `main` can say what is missing.
"""

from __future__ import annotations

import io
import sys

from ..errors import Exit

__all__ = ["EXTRA", "main"]

#: The packages of the extra ``cli``, by import name.
EXTRA = ("matplotlib", "ml_dtypes", "rich", "safetensors", "typer")


def main() -> None:
    """Run the command line; never returns."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if not optional(error):
            raise
        print(missing(error), file=sys.stderr)
        raise SystemExit(int(Exit.MISSING)) from None
    # A character that the terminal's encoding lacks is printed as an escape, as on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="pdcore")
    except OSError as error:  # from the help or the version: commands report their own
        from .reporting import discard_output, note

        discard_output()
        note(f"pdcore: {error}")
        raise SystemExit(int(Exit.OUTPUT)) from None


def optional(error: ModuleNotFoundError) -> bool:
    """Return whether the missing module belongs to the extra ``cli``."""
    return (error.name or "").partition(".")[0] in EXTRA


def missing(error: ModuleNotFoundError) -> str:
    """Return the message that an optional package is missing, and what installs it."""
    package = (error.name or "").partition(".")[0]
    return f"pdcore: {package} is not installed: pip install 'pdcore[cli]'"
