"""How commands speak: results on stdout, everything else on stderr, an exit code for each kind."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..errors import Exit, NoBackendError, PluginError, SpecError, UnsupportedError
from . import missing, optional
from .files import FileError, OutputError

__all__ = ["Failed", "emit", "note", "progress", "reported", "stdout"]

P = ParamSpec("P")

#: A bar appears when a command has run for this long, in seconds.
PATIENCE = 2.0

#: Whether the running command has printed its JSON, which is one document.
_emitted: ContextVar[bool] = ContextVar("emitted", default=False)


class Failed(Exception):  # noqa: N818 - it carries an outcome, such as an unmet target
    """Ends a command with an exit code, whether or not its result has been printed.

    Parameters
    ----------
    code : Exit
        The exit code.
    message : str
        For stderr.
    """

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Signalled(BaseException):
    """A signal that asks the process to end, so that `finally` blocks run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# The first class that fits decides, so subclasses come before their bases.
_CODES: tuple[tuple[type[Exception], Exit], ...] = (
    (FileError, Exit.INPUT),
    (OutputError, Exit.OUTPUT),
    (SpecError, Exit.USAGE),
    (UnsupportedError, Exit.UNSUPPORTED),
    (NoBackendError, Exit.NO_BACKEND),
    (PluginError, Exit.FAILURE),
    (MemoryError, Exit.FAILURE),
)


def stdout() -> Console:
    """Give a console on the present standard output."""
    return Console(highlight=False)


def stderr() -> Console:
    """Give a console on the present standard error."""
    return Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """Say something that is not the result."""
    stderr().print(escape(message), soft_wrap=True)


def emit(result: Any) -> None:
    """Print a result as JSON, and nothing else, on stdout.

    NaN and infinities, which JSON does not have, become null.
    """
    _emitted.set(True)
    sys.stdout.write(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the exceptions of a command into messages and exit codes.

    A command with ``as_json`` set gets its error as JSON on stdout too, where its result is not
    there yet.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _emitted.set(False)
        try:
            with _signals():
                command(*args, **kwargs)
            return
        except _Signalled as caught:
            code, kind = 128 + caught.number, "Interrupted"
            message = f"ended by {signal.Signals(caught.number).name}"
        except Failed as failed:
            code, message = int(failed.code), str(failed)
            kind = type(failed.__cause__ or failed).__name__
        except ModuleNotFoundError as error:
            if not optional(error):
                raise
            code, kind = int(Exit.MISSING), type(error).__name__
            message = missing(error).removeprefix("pdcore: ")
        except tuple(error for error, _ in _CODES) as error:
            code = int(next(c for cls, c in _CODES if isinstance(error, cls)))
            kind, message = type(error).__name__, str(error)
            if isinstance(error, MemoryError):
                message = message or "out of memory"
        if kwargs.get("as_json") and not _emitted.get():
            emit({"error": {"kind": kind, "message": message}, "exit_code": code})
        note(f"pdcore: {message}")
        raise typer.Exit(code)

    # In the help only the first paragraph would be filled anew, and the others keep their lines.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return run


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let signals that end the process unwind the stack; one that is ignored stays ignored.

    Ctrl-C too: a KeyboardInterrupt that passes through an `eval`, and modules have some, makes
    the interpreter end by the signal whatever exit code it is given.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def unwind(number: int, frame: Any) -> None:
        raise _Signalled(number)

    numbers = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = {number: signal.getsignal(number) for number in numbers}
    usual = (signal.SIG_DFL, signal.default_int_handler)
    for number, handler in before.items():
        if handler in usual:
            signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler in usual:
                signal.signal(number, handler)


@contextlib.contextmanager
def progress(title: str, *, patience: float | None = None) -> Iterator[Callable[[float], None]]:
    """Show a bar with the time left on stderr, once the block has taken a while.

    Nothing is shown where stderr is no terminal.

    Parameters
    ----------
    title : str
        What is going on.
    patience : float, optional
        Seconds until the bar appears; `PATIENCE` by default.

    Yields
    ------
    callable
        To be told the share of the work that is done.
    """
    console = stderr()
    if not console.is_terminal:
        yield lambda share: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(escape(title), total=1.0)
    shown = threading.Event()

    def show() -> None:
        bar.start()
        shown.set()

    timer = threading.Timer(PATIENCE if patience is None else patience, show)
    timer.daemon = True
    timer.start()
    try:
        yield lambda share: bar.update(task, completed=share)
    finally:
        timer.cancel()
        timer.join()  # or the bar might start after it was stopped
        if shown.is_set():
            bar.stop()
