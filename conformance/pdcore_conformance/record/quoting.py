"""Values of a hostile file in a few harmless words, for error messages."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["encodable", "kind_of", "quoted", "shortened"]


def kind_of(value: Any) -> str:
    """Return what a value of parsed JSON is: an array, an object, or the value itself, quoted."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return quoted(value)


def quoted(value: Any) -> str:
    """Quote any value in a few words; `ascii`, so that nothing in it acts on a terminal."""
    if isinstance(value, list | dict):
        return kind_of(value)
    if isinstance(value, int) and not -(10**30) < value < 10**30:
        return "an integer of over 30 digits"
    return shortened(ascii(value))


def shortened(text: str) -> str:
    """Cut a text after 200 characters, with escapes for those that are not printable."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:400])
    return text if len(text) <= 200 else f"{text[:200]}..."


def encodable(value: Any) -> Any:
    """Return parsed JSON with escapes for halves of surrogate pairs, which no file can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [encodable(item) for item in value]
    if isinstance(value, dict):
        return {encodable(name): encodable(item) for name, item in value.items()}
    return value
