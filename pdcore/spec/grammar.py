"""How the words of a string are read, and made into what they name."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, fields
from typing import Any

from ..errors import SpecError, nearest

__all__ = ["bind_arguments", "build", "made", "read_arguments", "read_words"]

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?\s*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\Z")


def read_words(
    text: str,
    what: str = "spec",
    expected: str = "words joined by '+', such as 'softmax+bn(beta=0.5)+causal'",
) -> list[tuple[str, str | None]]:
    """Read words joined by ``+``, each with the text of its arguments, None without any.

    A refusal calls the text `what`, and says what was `expected`.
    """
    found: list[tuple[str, str | None]] = []
    at = 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != "+"):
            where = match.end() if match else at
            rest = text[where : where + 12]
            raise SpecError(
                f"{what} {text!r}: cannot read it at column {where + 1} ({rest!r}); "
                f"expected {expected}"
            )
        found.append((match[1], match[2]))
        if match.end() == len(text):
            return found
        at = match.end() + 1


def read_arguments(word: str, text: str | None) -> tuple[list[Any], dict[str, Any]]:
    """Read the arguments of a word: those by position, and those by name."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for part in (text or "").split(",") if text and text.strip() else ():
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            if named:
                raise SpecError(f"{word}({text}): {part.strip()!r} follows a named argument")
            positional.append(_value(word, name))
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
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    if text.isidentifier():
        return text
    raise SpecError(
        f"{word}: cannot read the argument {text!r}: expected a number, inf, true, false or a name"
    )


def bind_arguments(
    word: str, names: tuple[str, ...], positional: list[Any], named: dict[str, Any]
) -> dict[str, Any]:
    """Give every argument its name, and refuse names that are not known."""
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
    """Make an instance of a dataclass from the text of its arguments."""
    return made(word, cls, *read_arguments(word, arguments))


def made(word: str, cls: type[Any], positional: list[Any], named: dict[str, Any]) -> Any:
    """Make an instance of a dataclass that a word names.

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
        given = ",".join(f"{name}={value}" for name, value in bound.items())
        raise SpecError(f"{word}({given}): {error}") from error


_SCALARS = frozenset({"int", "float", "str", "bool", "None"})


def _coerce(word: str, name: str, annotation: Any, value: Any) -> Any:
    """Fit a value to a field's annotation: int, float, str, bool and unions of these.

    The annotation is a string or, in a module without postponed annotations, an object. One
    that says anything else is left to the class itself to check.
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
