"""The grammar of spec strings: reading words and arguments, and instantiating classes."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields
from typing import Any

from ..errors import SpecError, cut, nearest

__all__ = ["bind_arguments", "build", "instantiate", "read_arguments", "read_words"]

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?\s*")
#: The longest text of a spec, in characters.
LONGEST = 10_000
#: The largest whole number in a spec: no axis is longer, and every float holds it.
LARGEST = 2**63 - 1
#: The largest number of arguments that a run such as ``2*16`` stands for.
LONGEST_RUN = 1024
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\Z")


def read_words(
    text: str,
    what: str = "spec",
    expected: str = "words joined by '+', such as 'softmax+bn(beta=0.5)+causal'",
) -> list[tuple[str, str | None]]:
    """Read words joined by ``+``.

    Parameters
    ----------
    text : str
        The words.
    what, expected : str
        How error messages call the text, and what they say was expected.

    Returns
    -------
    list of (str, str or None)
        Each word with the text of its arguments, None for a word without parentheses.
    """
    if len(text) > LONGEST:
        raise SpecError(
            f"{what} {cut(text)!r}: got {len(text)} characters, expected at most {LONGEST}"
        )
    words: list[tuple[str, str | None]] = []
    at = 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != "+"):
            where = match.end() if match else at
            rest = text[where : where + 12]
            raise SpecError(
                f"{what} {cut(text)!r}: cannot read it at column {where + 1} ({rest!r}); "
                f"expected {expected}"
            )
        words.append((match[1], match[2]))
        if match.end() == len(text):
            return words
        at = match.end() + 1


def read_arguments(
    word: str, text: str | None, *, runs: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a word by position, and those by name.

    With `runs`, ``2*16`` by position is the argument 2, sixteen times.
    """
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for part in (text or "").split(",") if text and text.strip() else ():
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            if named:
                raise SpecError(f"{word}({text}): {part.strip()!r} follows a named argument")
            one, star, times = name.partition("*") if runs else (name, "", "")
            count = _value(word, times.strip()) if star else 1
            if type(count) is not int or not 1 <= count <= LONGEST_RUN:
                raise SpecError(
                    f"{word}: got {cut(name)!r}, expected a whole number from 1 to {LONGEST_RUN} "
                    "after *"
                )
            positional += [_value(word, one.strip())] * count
        elif name in named:
            raise SpecError(f"{word}({text}): {name} is given twice")
        else:
            named[name] = _value(word, value)
    return positional, named


def _value(word: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text == "inf":
        return math.inf
    if _NUMBER.match(text):
        return _number(word, text)
    if text.isidentifier():
        return text
    raise SpecError(
        f"{word}: cannot read the argument {cut(text)!r}: expected a number, inf, true, false or "
        "a name"
    )


def _number(word: str, text: str) -> int | float:
    digits = text.lstrip("+-")
    if not digits.isdigit():
        value = float(text)
        if math.isinf(value):
            raise SpecError(f"{word}: {cut(text)} is beyond float64; write inf for infinity")
        return value
    # Python does not convert texts of thousands of digits.
    if len(digits) > 19 or int(digits) > LARGEST:
        raise SpecError(f"{word}: got {cut(text)}, expected a whole number up to {LARGEST}")
    return int(text)


def bind_arguments(
    word: str, names: tuple[str, ...], positional: list[Any], named: dict[str, Any]
) -> dict[str, Any]:
    """Return all arguments by name; raise for unknown names and repeated arguments."""
    if len(positional) > len(names):
        raise SpecError(
            f"{word}: got {len(positional)} arguments, takes {len(names)}"
            f"{': ' + ', '.join(names) if names else ''}"
        )
    bound = dict(zip(names, positional, strict=False))
    for name, value in named.items():
        if name not in names:
            raise SpecError(f"{word}: unknown argument {name!r}; {nearest(name, names)}")
        if name in bound:
            raise SpecError(f"{word}: {name} is given twice")
        bound[name] = value
    return bound


def build(word: str, cls: type[Any], arguments: str | None) -> Any:
    """Instantiate a dataclass from the text of its arguments."""
    return instantiate(word, cls, *read_arguments(word, arguments))


def instantiate(word: str, cls: type[Any], positional: list[Any], named: dict[str, Any]) -> Any:
    """Instantiate the dataclass that a word names.

    Raises
    ------
    SpecError
        For arguments that are missing, unknown, too many, or of another type than the field's.
    """
    declared = {f.name: f for f in fields(cls) if f.init}
    bound = bind_arguments(word, tuple(declared), positional, named)
    missing = [
        name
        for name, f in declared.items()
        if name not in bound and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        needed = ",".join(f"{name}=..." for name in missing)
        raise SpecError(f"{word}: {' and '.join(missing)} must be given: {word}({needed})")
    for name, value in bound.items():
        bound[name] = _coerce(word, name, declared[name].type, value)
    try:
        return cls(**bound)
    except TypeError as error:
        arguments = ",".join(f"{name}={value}" for name, value in bound.items())
        raise SpecError(f"{word}({arguments}): {error}") from error


_SCALARS = frozenset({"int", "float", "str", "bool", "None"})


def _coerce(word: str, name: str, annotation: Any, value: Any) -> Any:
    """Check a value against a field's annotation; convert int to float where needed.

    Checked are annotations of int, float, str, bool and unions of these; other fields are left to
    the class. An annotation is a string or, in a module without postponed annotations, an object.
    """
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    optional = text.removeprefix("typing.").removeprefix("Optional[")
    kinds = {part.strip() for part in optional.removesuffix("]").split("|")}
    if not kinds <= _SCALARS:
        return value
    if type(value) is int and "int" not in kinds and "float" in kinds:
        return float(value)
    if type(value).__name__ in kinds:
        return value
    raise SpecError(f"{word}: {name} is {value!r}, expected {text}")
