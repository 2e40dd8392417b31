"""Output of the commands: results on stdout, the rest on stderr, an exit code for each error."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.segment import Segment

from ..errors import (
    Exit,
    NoBackendError,
    PluginError,
    SettingError,
    SpecError,
    UnsupportedError,
    concise,
    visible,
)
from . import missing, optional
from .files import FileError, OutputError

__all__ = [
    "Failed",
    "concise_usage_errors",
    "discard_output",
    "emit",
    "note",
    "progress",
    "reported",
    "stdout",
]

P = ParamSpec("P")

#: A bar appears when a command has run for this long, in seconds.
PATIENCE = 2.0

#: Whether the running command has printed its JSON, which is one document.
_emitted: ContextVar[bool] = ContextVar("emitted", default=False)
#: Where the JSON of the running command goes; whatever else prints then goes to standard error.
_json_stream: ContextVar[TextIO | None] = ContextVar("json_stream", default=None)


class Failed(Exception):  # noqa: N818 - it carries an outcome, such as an unmet target
    """Ends a command with an exit code, whether or not its result has been printed.

    Parameters
    ----------
    code : Exit
        The exit code.
    message : str
        The message on stderr.
    """

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Signalled(KeyboardInterrupt):
    """A signal to end the process, raised so that `finally` blocks run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# The first matching class decides, so subclasses come before their bases.
_CODES: tuple[tuple[type[Exception], Exit], ...] = (
    (FileError, Exit.INPUT),
    (OutputError, Exit.OUTPUT),
    (SpecError, Exit.USAGE),
    (SettingError, Exit.USAGE),
    (UnsupportedError, Exit.UNSUPPORTED),
    (NoBackendError, Exit.NO_BACKEND),
    (PluginError, Exit.FAILURE),
    (MemoryError, Exit.FAILURE),
    # Reading raises `FileError`; what is left is a full disk, or standard output that is closed.
    (OSError, Exit.OUTPUT),
)

#: The base of the errors of an option or argument, which Typer prints.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Console(Console):
    """A console that prints text as `visible`, so that no name of a file or plugin acts on it."""

    def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
        for segment in super().render(*args, **kwargs):
            shown = segment.control or visible(segment.text) == segment.text
            yield segment if shown else Segment(visible(segment.text), segment.style)


def stdout() -> Console:
    """Return a console on the present standard output."""
    return _Console(highlight=False)


def stderr() -> Console:
    """Return a console on the present standard error."""
    return _Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """Print a message on standard error."""
    stderr().print(escape(concise(message)), soft_wrap=True)


@contextlib.contextmanager
def concise_usage_errors() -> Iterator[None]:
    """Make the usage errors of the block, which echo arguments, concise."""
    try:
        yield
    except UsageError as error:
        error.message = concise(error.message)  # type: ignore[attr-defined]
        raise


def emit(result: Any) -> None:
    """Print a result as JSON, and nothing else, on stdout.

    NaN and infinities, which JSON does not have, become null.
    """
    _emitted.set(True)
    stream = _json_stream.get() or sys.stdout
    stream.write(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")
    stream.flush()


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

    Where ``as_json`` is set and no result has been printed, the error is printed as JSON too.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        _emitted.set(False)
        try:
            with _signals(), _only_json() if kwargs.get("as_json") else contextlib.nullcontext():
                command(*args, **kwargs)
                sys.stdout.flush()
            return
        except BrokenPipeError:
            raise  # the reader has seen enough: Typer ends the command in silence
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
            if code == Exit.OUTPUT:
                discard_output()
        message = concise(message)
        if kwargs.get("as_json") and not _emitted.get():
            emit({"error": {"kind": kind, "message": message}, "exit_code": code})
        note(f"pdcore: {message}")
        raise typer.Exit(code)

    # Typer fills the lines of the first paragraph only; so every paragraph becomes one line.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return run


def discard_output() -> None:
    """Flush standard output, or drop what it does not take: the interpreter flushes at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


@contextlib.contextmanager
def _only_json() -> Iterator[None]:
    """Let only `emit` write to standard output: a plugin may print while it is imported or runs."""
    with _apart(sys.stdout) as stream:
        token = _json_stream.set(stream)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            _json_stream.reset(token)


@contextlib.contextmanager
def _apart(output: TextIO) -> Iterator[TextIO]:
    """Return a stream to where this one goes, while its descriptor goes to standard error.

    So what a library in C or a child process prints goes there too. A stream without a descriptor
    is returned as it is.
    """
    try:
        number, error = output.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        yield output
        return
    output.flush()
    stream = open(os.dup(number), "w", encoding=output.encoding, errors=output.errors)  # noqa: SIM115
    os.dup2(error, number)
    try:
        yield stream
    finally:
        os.dup2(stream.fileno(), number)
        # What a full disk does not take has been reported by `emit`.
        with contextlib.suppress(OSError):
            stream.close()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let signals that end the process unwind the stack; an ignored signal stays ignored.

    Ctrl-C too: a KeyboardInterrupt that passes through an `eval` (some modules have one) ends the
    interpreter by the signal, whatever the exit code.
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
def progress(title: str, *, patience: float | None = None) -> Iterator[Callable[..., None]]:
    """Show a bar with the time left on stderr, once the block has taken a while.

    Where stderr is no terminal, the steps that are named are lines, and nothing else is shown.

    Parameters
    ----------
    title : str
        The text beside the bar.
    patience : float, optional
        Seconds until the bar appears; `PATIENCE` by default.

    Yields
    ------
    callable
        A function to call with the share of the work that is done, up to 1, and before a long
        step with the step's name.
    """
    console = stderr()
    if not console.is_terminal:
        yield lambda share, step="": note(f"{title}: {share:.0%}, {step}") if step else None
        return
    from rich.progress import (  # for those who wait; the help need not load it
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

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
        yield lambda share, step="": bar.update(
            task, completed=share, description=escape(f"{title}: {step}" if step else title)
        )
    finally:
        timer.cancel()
        timer.join()  # or the bar might start after it was stopped
        if shown.is_set():
            bar.stop()
