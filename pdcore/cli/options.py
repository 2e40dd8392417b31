"""Options that several commands have, and the checks of their values."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated

import typer

from ..errors import nearest
from ..plugins import registry as plugins

__all__ = [
    "AsJson",
    "BackendName",
    "DeviceName",
    "SpecText",
    "check_known",
    "parse_backends",
    "parse_whole",
]

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")
]
SpecText = Annotated[
    str, typer.Argument(metavar="SPEC", help="For example 'bn+sh(1,1,2,2)'; see `pdcore specs`.")
]
BackendName = Annotated[
    str | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        help="Run on this backend or fail; several, joined by commas, are tried in order.",
    ),
]


def _check_device(text: str | None) -> str | None:
    if text is not None and len(text) > 100:
        raise typer.BadParameter(f"got {text!r}, expected a device such as 'cuda' or 'cuda:1'")
    return text


DeviceName = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE", callback=_check_device, help="Move the arrays there, such as 'cuda'."
    ),
]


def parse_backends(text: str | None) -> list[str] | None:
    """Return the backends of ``--backend``; raise a usage error on an unknown one."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        kind = name.partition(":")[0]
        if not kind or not plugins.is_known(kind):
            raise typer.BadParameter(
                f"unknown backend {name!r}; {nearest(kind, plugins.registered())}",
                param_hint="--backend",
            )
    return names


def check_known(option: str, word: str, known: Collection[str]) -> None:
    """Raise a usage error where the value of an option is not a known word."""
    if word not in known:
        raise typer.BadParameter(f"unknown {word!r}; {nearest(word, known)}", param_hint=option)


def parse_whole(option: str, text: str, expected: str) -> int:
    """Return a whole number of at most 64 bits; raise a usage error for any other text."""
    # Python does not convert texts of thousands of digits.
    number = int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", text) else None
    if number is None or not -(2**63) <= number < 2**63:
        raise typer.BadParameter(f"got {text!r}, expected {expected}", param_hint=option)
    return number
