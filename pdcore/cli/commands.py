"""The command line as an application of Typer; each command is imported when it is called."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from .. import __version__
from ..errors import Exit, nearest
from ..plugins import BrokenPlugin
from . import optional
from .discovery import Command, find_commands
from .options import AsJson
from .reporting import Failed, concise_usage_errors, reported

__all__ = ["app"]

EXIT_CODES = (
    "Exit codes: "
    + "; ".join(f"{int(code)} {code.meaning}" for code in Exit)
    + "; 128 + n after signal n (130 after Ctrl-C)."
)

#: Commands of version 0.1, and where they are now.
MOVED = {"reproduce": "`python examples/reproduce.py`, in a checkout or the source archive"}


class _Group(typer.core.TyperGroup):
    """The declared commands by name; an unknown name is answered with the nearest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        commands, broken = find_commands()
        for command in commands.values():
            self.add_command(_Declared(command))
        for name, failure in broken.items():
            # A command that works is not hidden by a table of the same name that does not.
            free = name if name not in commands else f"{name} ({failure.distribution})"
            self.add_command(_failing(free, failure))

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with concise_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with concise_usage_errors():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            if name in MOVED:
                ctx.fail(f"unknown command {name!r}; it is {MOVED[name]} now")
            ctx.fail(f"unknown command {name!r}; {nearest(name, self.list_commands(ctx))}")
        _, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, _Declared) else command, rest


class _Declared(typer.core.TyperCommand):
    """A command in the list of the help, which is not imported."""

    def __init__(self, command: Command) -> None:
        super().__init__(command.name, help=escape(command.summary))
        self.command = command

    def load(self) -> Any:
        """Import the command; return one that fails with the reason where that fails."""
        try:
            return _build(self.command.name, self.command.load(), epilog=EXIT_CODES)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a command's defect is not a traceback
            return _failing(self.command.name, self.command.failure(error))


def _failing(name: str, failure: BrokenPlugin) -> Any:
    """Build a command that says why it, or the table that it is in, is broken."""

    @reported
    def command(as_json: AsJson = False) -> None:
        if isinstance(failure.error, ModuleNotFoundError) and optional(failure.error):
            raise failure.error
        raise Failed(Exit.FAILURE, f"{name!r} is broken: {failure}") from failure.error

    # Whatever its options are, the answer is the same.
    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return _build(name, command, help=escape(f"Broken: {failure}"), context_settings=settings)


def _build(name: str, function: Any, **options: Any) -> Any:
    single = typer.Typer(add_completion=False)
    single.command(name, **options)(function)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=_Group,
    help="Attention derived from support vector regression, on any array library.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pdcore {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass
