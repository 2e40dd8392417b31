"""Options that several commands have, and the checks of their values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import typer

from ..errors import nearest
from ..plugins import registry as plugins

__all__ = ["AsJson", "BackendName", "DeviceName", "SpecText", "check_known", "parse_backends"]

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
DeviceName = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="Move the arrays there, such as 'cuda'.")
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
