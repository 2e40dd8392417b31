"""The exceptions that pdcore raises beside `TypeError` and `ValueError`."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["NoBackendError", "PluginError", "SpecError", "UnsupportedError"]


class SpecError(ValueError):
    """A specification string or its arguments do not make sense."""


class UnsupportedError(NotImplementedError):
    """A well-formed request that the specification or a backend does not support.

    The message always gives the reason.
    """


class NoBackendError(RuntimeError):
    """No backend can run the call; the message lists every candidate's reasons.

    Attributes
    ----------
    reasons : dict[str, list[str]]
        Reasons by backend name.
    """

    def __init__(self, message: str, reasons: dict[str, list[str]] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})


class PluginError(ValueError):
    """A plugin declared something that cannot be registered."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Say what the nearest known word is, and list the known ones.

    Parameters
    ----------
    word : str
        The word that was not found.
    known : iterable of str
        The words that exist.

    Returns
    -------
    str
        For example ``"did you mean 'softmax'? known: cosine, softmax"``.
    """
    import difflib  # for errors only

    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.0)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) if names else '(none)'}"
