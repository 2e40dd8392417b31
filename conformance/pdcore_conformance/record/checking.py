"""Checks of parsed JSON against the declared types, and the JSON Schema that follows from these."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import msgspec

from pdcore.cli.files import FileError

from .compact import CompactRecord
from .quoting import kind_of, quoted, shortened
from .types import OUTCOMES, SCHEMA, Number, Record

__all__ = ["RecordError", "check", "check_sums", "converted", "json_schema"]

_WORDS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}

_NUMBER_SCHEMA = {
    "type": ["number", "string"],
    "pattern": "^(-?inf|nan)$",
    "description": "A number; an infinity or NaN is one of the strings inf, -inf and nan.",
}


class RecordError(FileError):
    """A file is not a record, or not one that this version can read."""


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a record, in both of its forms.

    Returns
    -------
    dict
        Ready for `json.dumps`. It leaves out what no schema can say: that the counts are the sums
        of the cases, and that ids, and pairs of backend and device, are there once.
    """
    references, definitions = msgspec.json.schema_components(
        (Record, CompactRecord), schema_hook=lambda kind: dict(_NUMBER_SCHEMA)
    )
    for definition in definitions.values():
        definition["additionalProperties"] = False
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:pdcore:conformance-record:{SCHEMA}",
        "title": f"Conformance record of pdcore, schema {SCHEMA}",
        "anyOf": list(references),
        "$defs": definitions,
    }


def check(content: Any) -> Record:
    """Check parsed JSON against the types of a record, and against itself.

    Parameters
    ----------
    content : object
        As `json.loads` returns it.

    Returns
    -------
    Record
        With numbers for the words that stand for infinities and NaN.

    Raises
    ------
    RecordError
        Naming the place, such as ``$.runs[0].cases[3].outcome``.
    """
    record: Record = converted(content, Record)
    check_sums(record)
    return record


def converted(content: Any, kind: Any) -> Any:
    """Convert parsed JSON to a declared type, or raise a RecordError that names the place."""
    try:
        result = msgspec.convert(content, kind, dec_hook=_number)
    except msgspec.ValidationError as error:
        raise RecordError(_violation(str(error), kind)) from None
    _refuse_unknown_keys(content, result, "$")
    return result


def _number(kind: type, value: Any) -> Number:
    """Read a number, or one of the words for the numbers that JSON lacks."""
    if type(value) is str and value in _WORDS:
        return Number(_WORDS[value])
    if type(value) not in (int, float):
        raise ValueError(f"got {kind_of(value)}, expected a number, 'inf', '-inf' or 'nan'")
    try:
        return Number(value)
    except OverflowError:
        raise ValueError("a number beyond any float") from None


_VIOLATION = re.compile(r"(?P<text>.*) - at (?P<key>`key` in )?`(?P<place>\$.*)`", re.DOTALL)


def _violation(message: str, kind: Any) -> str:
    """Put the place before the message of msgspec, and the choices of a literal after it."""
    parts = _VIOLATION.fullmatch(message)
    if parts is None:
        return f"$: {shortened(message)}"
    text, place = shortened(parts["text"]), parts["place"]
    if text.startswith("Invalid enum value"):
        choices = _choices(_type_at(place, kind), 0 if parts["key"] else -1)
        text += f", expected one of {', '.join(map(repr, choices))}" if choices else ""
    return f"{shortened(place)}: {text}"


def _type_at(place: str, kind: Any) -> Any:
    """Return the declared type of the entry at a place of a record."""
    for name in re.findall(r"\.(\w+)|\[", place):
        kind = _without_none(kind)
        kind = get_type_hints(kind).get(name) if is_typeddict(kind) else _argument(kind, -1)
    return _without_none(kind)


def _choices(kind: Any, argument: int) -> tuple[Any, ...]:
    """Return the values of a literal type, or of that argument of a mapping; else none."""
    if get_origin(kind) is dict:
        kind = _argument(kind, argument)
    return get_args(kind) if get_origin(kind) is Literal else ()


def _argument(kind: Any, index: int) -> Any:
    return (get_args(kind) or (None,))[index]


def _without_none(kind: Any) -> Any:
    arguments = get_args(kind)
    return arguments[0] if len(arguments) == 2 and arguments[1] is type(None) else kind


def _refuse_unknown_keys(content: Any, result: Any, place: str) -> None:
    """Raise where the content has a key that the conversion to the declared type left out."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if name not in result:
                raise RecordError(
                    f"{shortened(place)}: unknown key {quoted(name)}; schema {SCHEMA} has "
                    f"{', '.join(result)}"
                )
            _refuse_unknown_keys(value, result[name], f"{place}.{name}")
    elif isinstance(content, list):
        for index, (value, item) in enumerate(zip(content, result, strict=True)):
            _refuse_unknown_keys(value, item, f"{place}[{index}]")


def check_sums(record: Record) -> None:
    """Check that runs and cases are there once, and that the counts are those of the cases."""
    indices: dict[tuple[str, str], int] = {}
    for index, run in enumerate(record["runs"]):
        place, key = f"$.runs[{index}]", (run["backend"], run["device"])
        if key in indices:
            raise RecordError(
                f"{place}: the backend and device of $.runs[{indices[key]}] again; "
                "a record has one run for each"
            )
        indices[key] = index
        counts = dict.fromkeys(OUTCOMES, 0)
        ids = set()
        for number, case in enumerate(run["cases"]):
            counts[case["outcome"]] += 1
            if case["id"] in ids:
                raise RecordError(
                    f"{place}.cases[{number}].id: {quoted(case['id'])} is there twice"
                )
            ids.add(case["id"])
        for outcome, count in counts.items():
            if run["counts"][outcome] != count:
                raise RecordError(
                    f"{place}.counts: {run['counts'][outcome]} {outcome}, but "
                    f"{count} cases are: damaged or edited"
                )
