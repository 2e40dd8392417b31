"""The exceptions that pdcore raises beside `TypeError` and `ValueError`."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

__all__ = ["NoBackendError", "PluginError", "SettingError", "SpecError", "UnsupportedError"]


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


class SettingError(ValueError):
    """An environment variable has a value that does not make sense."""


def visible(text: object) -> str:
    r"""Return text with escapes for what would act on a terminal, or that no file can hold.

    Escaped are control characters other than newline and tab, marks that change the direction of
    the text around them, line separators, and bytes of file names that are not UTF-8.

    Examples
    --------
    >>> visible("a\x1b[31m")
    'a\\x1b[31m'
    """
    whole = str(text)
    if whole.isascii() and whole.isprintable():
        return whole
    return "".join(c if _is_harmless(c) else ascii(c)[1:-1] for c in whole)


def _is_harmless(character: str) -> bool:
    code = ord(character)
    if character in "\n\t":
        return True
    controls = code < 0x20 or 0x7F <= code < 0xA0
    directions = code in (0x61C, 0x200E, 0x200F) or 0x2028 <= code <= 0x202E
    return not (controls or directions or 0x2066 <= code <= 0x2069 or 0xD800 <= code < 0xE000)


def cut(text: object, length: int = 160) -> str:
    """Return text shortened in its middle, where ids differ least."""
    whole = str(text)
    if len(whole) <= length:
        return whole
    half = (length - 3) // 2
    return f"{whole[:half]}...{whole[-half:]}"


def concise(message: str) -> str:
    """Return a message for a terminal: `visible`, long words cut, and cut to 8,000 characters."""
    import re  # needed for error messages only

    words = re.split(r"(\s+)", cut(message, 8000)) if len(message) > 300 else [message]
    return visible("".join(cut(word, 300) for word in words))


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
    word = word[:100].lower()  # the time grows with the length
    # One wrong letter of two is near; two letters within a longer word are not.
    cutoff = 0.5 if len(word) < 4 else 0.6
    close = difflib.get_close_matches(word, lower, n=1, cutoff=cutoff)
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
    Exit.USAGE: "usage: an unknown command, option, spec word or backend, or a wrong environment "
    "variable",
    Exit.INPUT: "a file cannot be read, or its arrays do not fit",
    Exit.UNSUPPORTED: "the spec or the named backend does not support it",
    Exit.NO_BACKEND: "no backend can run it",
    Exit.OUTPUT: "the result exists already or cannot be written",
    Exit.NUMERICS: "a case of the suite fails, numerics got worse, or a loss is not finite",
    Exit.UNMET: "a target is not met, with --strict, or speed or memory got worse",
    Exit.MISSING: "an optional package is not installed",
}
