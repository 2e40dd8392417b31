"""The exceptions that pdcore raises beside `TypeError` and `ValueError`."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

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
    """Suggest the nearest known word, if one is near, and list all known words.

    A word that differs in case only is the nearest of all.

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
    import difflib  # needed for error messages only

    names = sorted(known)
    lower: dict[str, str] = {}
    for name in names:
        lower.setdefault(name.lower(), name)
    # One wrong letter of two is near; two letters within a longer word are not.
    cutoff = 0.5 if len(word) < 4 else 0.6
    close = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=cutoff)
    hint = f"did you mean {lower[close[0]]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) if names else '(none)'}"


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
        """What the code means, as the help prints it."""
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
