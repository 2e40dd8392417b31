"""Which backend runs a call, and why not the others.

The order of choice: ``backend=`` in the call, `use_backend`, the variable ``PDCORE_BACKEND``, and
else the library of the arrays, whose built-in backend comes before any third party's. A single
backend chosen by name runs the call or raises; a list of names falls back in its order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import lru_cache
from typing import NamedTuple

from ..backend import Backend, Request
from ..errors import NoBackendError, SettingError, UnsupportedError, nearest
from ..plugins import registry as plugins
from ..spec import AttentionSpec, Batch, Exponential, Identity, normaliser_word, scales_text

__all__ = [
    "Candidate",
    "ResolvedChoice",
    "Selection",
    "ambient",
    "choose",
    "reasons",
    "resolve",
    "select",
    "use_backend",
]

VARIABLE = "PDCORE_BACKEND"
#: The reason against a backend that another thread removes between the steps of a selection.
UNREGISTERED = "unregistered in the meantime"


class Candidate(NamedTuple):
    """A backend to try, and the device it was named with: ``"torch:cuda"``."""

    name: str
    device: str | None = None

    def __str__(self) -> str:
        return self.name if self.device is None else f"{self.name}:{self.device}"


class ResolvedChoice(NamedTuple):
    """The candidates of a call, in the order in which they are tried.

    Attributes
    ----------
    candidates : tuple of Candidate
    explicit : bool
        Whether the caller named them; else they are the backends of the arrays' library.
    source : str
        Where the choice comes from: ``"backend= in the call"``, ``"use_backend"``,
        ``"PDCORE_BACKEND"`` or ``"the arrays' library"``.
    """

    candidates: tuple[Candidate, ...]
    explicit: bool
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """The backends' names."""
        return tuple(candidate.name for candidate in self.candidates)


class Selection(NamedTuple):
    """The outcome of a choice.

    Attributes
    ----------
    backend : Backend
        The first candidate that does not refuse the request.
    device : str or None
        The device that was named with the backend, if the arrays are on another one.
    source : str
        As in `ResolvedChoice`.
    """

    backend: Backend
    device: str | None
    source: str


AnyChoice = str | Sequence[str] | ResolvedChoice | None

_block_choice: ContextVar[tuple[Candidate, ...] | None] = ContextVar("pdcore_backend", default=None)


@contextmanager
def use_backend(choice: str | Sequence[str] | None) -> Iterator[None]:
    """Choose the backend of all calls in a ``with`` block.

    The choice is a context variable: asyncio tasks inherit it, new threads do not. Enter the
    block in the thread, or run the thread's function by ``contextvars.copy_context().run``.

    Parameters
    ----------
    choice : str, sequence of str or None
        A backend's name, with or without a device (``"torch"``, ``"torch:cuda"``); or a list of
        names, tried in order. None cancels the choice of a surrounding block.

    Raises
    ------
    ValueError
        When no backend has such a name.

    Examples
    --------
    >>> with use_backend("numpy"):
    ...     resolve(None, "numpy").source
    'use_backend'
    """
    token = _block_choice.set(None if choice is None else _named(choice, "use_backend"))
    try:
        yield
    finally:
        _block_choice.reset(token)


#: The choice where the caller makes none: the backends of the arrays' library.
BY_LIBRARY = ResolvedChoice((), False, "the arrays' library")


def ambient() -> ResolvedChoice | None:
    """Return the present choice of `use_backend` or ``PDCORE_BACKEND``, None without one."""
    candidates = _block_choice.get()
    if candidates is not None:
        return ResolvedChoice(candidates, True, "use_backend")
    text = os.environ.get(VARIABLE)
    if text and not text.isspace():
        try:
            return ResolvedChoice(_named(tuple(text.split(",")), VARIABLE), True, VARIABLE)
        except ValueError as error:
            raise SettingError(str(error)) from error
    return None


def resolve(choice: AnyChoice, library: str) -> ResolvedChoice:
    """Return the backends that a call may use, in order.

    Parameters
    ----------
    choice : str, sequence of str, ResolvedChoice or None
        The call's ``backend=``, or the result of resolving it before.
    library : str
        The library of the arrays.

    Raises
    ------
    TypeError, ValueError
        When the choice is no name or list of names, or names no backend.
    """
    if isinstance(choice, ResolvedChoice):
        return choice if choice.explicit else _default(plugins.candidates(library))
    if choice is not None:
        source = "backend= in the call"
        return ResolvedChoice(_named(choice, source), True, source)
    return ambient() or _default(plugins.candidates(library))


def select(request: Request, choice: AnyChoice = None) -> Backend:
    """Return the first candidate that does not refuse a request.

    Parameters
    ----------
    request : Request
        The call, without its values.
    choice : str, sequence of str, ResolvedChoice or None
        As in `resolve`.

    Raises
    ------
    ValueError
        When the choice names no backend.
    UnsupportedError
        When a single backend was named and refuses; no other is tried.
    NoBackendError
        When a single backend was named and is not installed or does not load; or when no
        candidate can run the request. The error has the reasons of every backend.
    """
    return choose(request, choice).backend


def choose(request: Request, choice: AnyChoice = None) -> Selection:
    """Select a backend as `select` does; return also the named device and the source."""
    resolved = resolve(choice, request.library)
    for candidate in resolved.candidates:
        backend, refused = _judge(candidate, request)
        if backend is not None and not refused:
            device = candidate.device
            if device is None or _on(request.device, device):
                return Selection(backend, None, resolved.source)
            return Selection(backend, device, resolved.source)
    raise _failure(request, resolved)


def reasons(request: Request, choice: AnyChoice = None) -> dict[str, list[str]]:
    """Return the reasons why each backend cannot run a request, by the predicate of `select`.

    Parameters
    ----------
    request : Request
        The call, without its values.
    choice : str, sequence of str, ResolvedChoice or None
        As in `resolve`; backends that it names are asked about arrays of any library.

    Returns
    -------
    dict of str to list of str
        For every declared backend and every broken or disabled plugin; an empty list means that
        the backend can run the request. A backend of another library than the arrays' is not
        imported to be asked, unless it is named. One that runs only if named is asked only then.
    """
    return _reasons(request, resolve(choice, request.library))


def in_words(spec: AttentionSpec) -> str:
    """Return a description of a spec in words, for error messages."""
    kernel = spec.kernel
    arguments = [
        f"{f.name} {getattr(kernel, f.name)}"
        for f in fields(kernel)  # type: ignore[arg-type]
        if getattr(kernel, f.name) != f.default
    ]
    name = "exponential" if isinstance(kernel, Exponential) else kernel.word
    parts = [f"{name} kernel" + (f" ({', '.join(arguments)})" if arguments else "")]
    parts += [term.word for term in spec.terms]
    if h := normaliser_word(spec.normaliser, spec.sink):
        parts.append(h)
    if isinstance(spec.normalization, Batch):
        over = spec.normalization.statistics
        parts.append(f"{'batch' if over == 'sequence' else f'batch ({over})'} normalization")
    elif not isinstance(spec.normalization, Identity):
        parts.append(f"{spec.normalization.word} normalization")
    if spec.heads.scales:
        first = ", the first key of a window" if spec.heads.pool == "first" else ""
        parts.append(f"heads ({scales_text(spec.heads.scales).replace(',', ', ')}){first}")
    if spec.support.causal:
        parts.append("causal")
    if (spec.support.left, spec.support.right) != (float("inf"), float("inf")):
        parts.append(f"window ({spec.support.left}, {spec.support.right})")
    return ", ".join(parts)


def table(reasons_by_name: dict[str, list[str]]) -> str:
    """Format reasons as aligned lines, one for each backend."""
    width = max((len(name) for name in reasons_by_name), default=0) + 1
    return "\n".join(
        f"  {name + ':':<{width}} {'; '.join(why) or 'can run'}"
        for name, why in reasons_by_name.items()
    )


@lru_cache(maxsize=256)
def _default(names: tuple[str, ...]) -> ResolvedChoice:
    return ResolvedChoice(tuple(Candidate(name) for name in names), False, "the arrays' library")


def _named(choice: object, source: str) -> tuple[Candidate, ...]:
    if isinstance(choice, str):
        named = _parsed((choice,), source)
    elif isinstance(choice, Sequence) and all(isinstance(text, str) for text in choice):
        named = _parsed(tuple(choice), source)
    else:
        got = type(choice).__name__ if hasattr(choice, "shape") else repr(choice)
        raise TypeError(
            f"{source}: got {got}, expected a backend's name such as 'torch' or "
            "'torch:cuda', or a list of names"
        )
    for name, _ in named:
        if not plugins.is_known(name):
            raise ValueError(
                f"{source}: unknown backend {name!r}; {nearest(name, plugins.registered())}"
                + (f"; failed to load: {', '.join(plugins.broken)}" if plugins.broken else "")
            )
    return named


@lru_cache(maxsize=256)
def _parsed(texts: tuple[str, ...], source: str) -> tuple[Candidate, ...]:
    named = []
    for text in texts:
        name, colon, device = text.strip().partition(":")
        if not name or (colon and not device):
            raise ValueError(
                f"{source}: got {text!r}, expected a backend's name such as 'torch' or 'torch:cuda'"
            )
        named.append(Candidate(name, device or None))
    if not named:
        raise ValueError(f"{source}: got an empty list, expected the name of a backend")
    return tuple(named)


def _on(device: str, wanted: str) -> bool:
    """Return whether `device` is `wanted`: ``"cuda:1"`` is ``"cuda"``, but not ``"cuda:0"``."""
    return device == wanted or device.partition(":")[0] == wanted


def _judge(candidate: Candidate, request: Request) -> tuple[Backend | None, list[str]]:
    """Ask one backend about one request; the backend can run it if it returns no reasons.

    Returns
    -------
    backend : Backend or None
        None when the backend is not installed or failed to load.
    reasons : list of str
    """
    name, device = candidate
    try:
        backend = plugins.load_backend(name)
    except NoBackendError as error:
        return None, error.reasons[name]
    except ValueError:  # known when the call was resolved
        return None, [UNREGISTERED]
    if device is not None and not _on(request.device, device):
        kind = device.partition(":")[0]
        if kind not in backend.info.devices:
            return backend, [f"device {device}: runs on {', '.join(backend.info.devices)}"]
        request = request._replace(device=device)
    library = backend.info.library
    if library != request.library:
        if type(backend).exchange is Backend.exchange:
            return backend, [f"takes {library} arrays only, got {request.library}"]
        request = request._replace(library=library)
    try:
        refused: object = backend.refusals(request)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - one defect must not hide the others
        text = " ".join(str(error).split())
        return None, [f"its refusals() raised {type(error).__name__}: {text}"]
    if not isinstance(refused, list):
        return None, [f"its refusals() returned {type(refused).__name__}, expected a list of str"]
    return backend, refused


def _reasons(request: Request, resolved: ResolvedChoice) -> dict[str, list[str]]:
    by_name = {}
    if resolved.explicit:
        by_name = {str(c): _judge(c, request)[1] for c in resolved.candidates}
    named = set(resolved.names) if resolved.explicit else set()
    for name, info in plugins.registered().items():
        if name in named or info.only_if_named:
            continue
        unavailable = plugins.unavailable_reason(info)
        if unavailable is not None:
            by_name[name] = [unavailable]
        elif info.library != request.library:
            why = f"takes {info.library} arrays, others only if named (backend={name!r})"
            by_name[name] = [why]
        else:
            by_name[name] = _judge(Candidate(name), request)[1]
    for name, failure in list(plugins.broken.items()):
        if name not in named:
            by_name[_unused_name(name, failure.distribution, by_name)] = [
                f"failed to load: {failure}"
            ]
    for name, why in list(plugins.disabled.items()):
        if name not in named:
            by_name[_unused_name(name, "disabled", by_name)] = [why]
    return by_name


def _unused_name(name: str, owner: str, taken: dict[str, list[str]]) -> str:
    # A plugin is named by its entry point, and a backend of another plugin may have that name.
    return name if name not in taken else f"{name} ({owner})"


def _failure(request: Request, resolved: ResolvedChoice) -> Exception:
    """Build the error for a request that no candidate can run."""
    about = f"  {request}"
    if resolved.explicit and len(resolved.candidates) == 1:
        candidate = resolved.candidates[0]
        backend, why = _judge(candidate, request)
        end = (
            f"{in_words(request.spec)}: {'; '.join(why)}\n{about}\n"
            f"  no other backend is tried, because {str(candidate)!r} was named by "
            f"{resolved.source}"
        )
        if backend is None:
            return NoBackendError(f"backend {candidate} cannot run {end}", {str(candidate): why})
        return UnsupportedError(f"backend {candidate} does not support {end}")
    by_name = _reasons(request, resolved)
    if resolved.explicit:
        for name in by_name.keys() - {str(c) for c in resolved.candidates}:
            by_name[name] = by_name[name] or [f"not named by {resolved.source}"]
    return NoBackendError(
        f"no backend can run {in_words(request.spec)}\n{about}\n{table(by_name)}", by_name
    )
