"""``pdcore specs``: the presets and the words of a specification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..plugins import list_words
from .options import AsJson
from .reporting import emit, reported, stdout

__all__ = ["specs"]


@reported
def specs(as_json: AsJson = False) -> None:
    """List the presets, and the words of a spec with their arguments and defaults."""
    vocabulary = list_words()
    if as_json:
        emit(vocabulary)
        return
    presets = Table("preset", "what it is", title="Presets", title_justify="left")
    for preset in vocabulary["presets"]:
        presets.add_row(escape(preset["name"]), escape(preset["meaning"]))
    words = Table("word", "sets", "what it is", title="Words, joined by +", title_justify="left")
    for word in vocabulary["words"]:
        words.add_row(escape(_usage(word)), word["axis"], escape(word["meaning"]))
    stdout().print(presets)
    stdout().print(words)
    stdout().print("An argument in \\[brackets] may be left out and has no default value.")


def _usage(word: Mapping[str, Any]) -> str:
    """Return a word with its arguments, and its aliases."""
    arguments = ", ".join(_argument(a) for a in word["arguments"])
    form = f"{word['word']}({arguments})" if arguments else word["word"]
    return " or ".join([form, *word["aliases"]])


def _argument(argument: Mapping[str, Any]) -> str:
    if argument["required"]:
        return str(argument["name"])
    default = argument["default"]
    if default is None:
        return f"[{argument['name']}]"
    return f"{argument['name']}={str(default).lower() if isinstance(default, bool) else default}"
