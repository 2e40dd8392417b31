"""Reading a record: whatever the file holds, the answer is a record or a `RecordError`."""

from __future__ import annotations

import json
import stat
import types
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from pdcore.cli.files import FileError

from .types import KIND, OUTCOMES, SCHEMA, Record

__all__ = ["LIMIT", "RecordError", "check", "is_record", "load", "schema"]

#: In bytes. No honest record comes near it: 3,000 cases are about 1.5 MB.
LIMIT = 64 << 20

_WORDS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


class RecordError(FileError):
    """A file is not a record, or not one that this version can read."""


@cache
def schema() -> dict[str, Any]:
    """Read the published JSON Schema of a record."""
    text = files(__package__).joinpath("record.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def load(path: str | Path) -> Record:
    """Read a record.

    Parameters
    ----------
    path : path
        A file that `save` wrote, or that follows the schema.

    Returns
    -------
    Record
        Checked: its structure always, by the JSON Schema where jsonschema is installed.

    Raises
    ------
    RecordError
        Naming the file and what is wrong with it; for a violation, where.
    """
    path = Path(path)
    found = _parse(path, _read(path))
    if not isinstance(found, dict) or found.get("kind") != KIND:
        what = f"kind {_short(found.get('kind'))}" if isinstance(found, dict) else _kind(found)
        raise RecordError(
            f"{path}: not a conformance record: got {what}, expected an object "
            f"of kind {KIND!r}, as `pdcore conform --report` writes"
        )
    number = found.get("schema")
    if type(number) is int and number > SCHEMA:
        raise RecordError(
            f"{path}: written in schema {_short(number)}, and this pdcore reads up "
            f"to {SCHEMA}: upgrade pdcore"
        )
    try:
        return check(found)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None


def is_record(path: Path) -> bool:
    """Tell whether a file is a record of any version, whole and legible."""
    try:
        found = _parse(path, _read(path))
    except RecordError:
        return False
    return isinstance(found, dict) and found.get("kind") == KIND


def _read(path: Path) -> str:
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            raise RecordError(f"{path}: is a directory, expected a record (a JSON file)")
        if not stat.S_ISREG(about.st_mode):
            raise RecordError(f"{path}: not a regular file")
        with path.open("rb") as stream:
            content = stream.read(LIMIT + 1)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or error}") from error
    except RecordError:
        raise
    except ValueError as error:  # a name with a NUL
        raise RecordError(f"{path!r}: not the name of a file: {error}") from error
    if len(content) > LIMIT:
        raise RecordError(f"{path}: over {LIMIT >> 20} MiB, which no record is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}: not UTF-8 text: byte {content[error.start]:#04x} at {error.start}"
        ) from None


def _parse(path: Path, text: str) -> Any:
    if not text.strip():
        raise RecordError(f"{path}: it is empty, expected a record (a JSON file)")
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        if cut:
            raise RecordError(f"{path}: the JSON is truncated: it breaks off at {place}") from None
        raise RecordError(f"{path}: not JSON: {error.msg} at {place}") from None
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None
    except ValueError as error:  # such as an integer of thousands of digits
        raise RecordError(f"{path}: not JSON that can be read: {error}") from None
    except RecursionError:
        raise RecordError(f"{path}: nested too deeply, which no record is") from None
    except MemoryError:
        raise RecordError(f"{path}: does not fit into memory, as any record would") from None


def _no_constant(word: str) -> Any:
    raise RecordError(
        f"not JSON: it holds the bare word {word}; a record writes it as the string "
        f"{word.replace('Infinity', 'inf').lower()!r}"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError(f"damaged: the key {_short(twice)} is twice in one object")
    return found


def check(found: Any) -> Record:
    """Check parsed JSON against the types, the schema, and itself.

    Returns
    -------
    Record
        With numbers for the words that stand for infinities and NaN.

    Raises
    ------
    RecordError
        Naming the place, such as ``$.runs[0].cases[3].outcome``.
    """
    record: Record = _fit(found, Record, "$")
    try:
        from jsonschema import Draft202012Validator
    except ModuleNotFoundError:
        pass  # what is left to check then are bounds and formats
    else:
        # The first violation will do: a hostile file may have millions.
        violation = next(Draft202012Validator(schema()).iter_errors(found), None)
        if violation is not None:
            place = _cut(violation.json_path)
            raise RecordError(f"does not follow the schema: {place}: {_cut(violation.message)}")
    _check_sums(record)
    return record


def _check_sums(record: Record) -> None:
    seen: dict[tuple[str, str], int] = {}
    for index, run in enumerate(record["runs"]):
        place, key = f"$.runs[{index}]", (run["backend"], run["device"])
        if key in seen:
            raise RecordError(
                f"{place}: the backend and device of $.runs[{seen[key]}] again; "
                "a record has one run for each"
            )
        seen[key] = index
        counted = dict.fromkeys(OUTCOMES, 0)
        ids = set()
        for number, case in enumerate(run["cases"]):
            counted[case["outcome"]] += 1
            if case["id"] in ids:
                raise RecordError(
                    f"{place}.cases[{number}].id: {_short(case['id'])} is there twice"
                )
            ids.add(case["id"])
        for outcome, count in counted.items():
            if run["counts"][outcome] != count:
                raise RecordError(
                    f"{place}.counts: {run['counts'][outcome]} {outcome}, but "
                    f"{count} cases are: damaged or edited"
                )


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fit(value: Any, hint: Any, place: str) -> Any:
    """Return `value` as the type that `hint` names, or say where it is another."""
    if is_typeddict(hint):
        return _fit_object(value, hint, place)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        if value is None:
            return None
        [hint] = [argument for argument in arguments if argument is not types.NoneType]
        return _fit(value, hint, place)
    if origin is list:
        _expect(type(value) is list, value, "an array", place)
        return [_fit(item, arguments[0], f"{place}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if get_origin(arguments[0]) is Literal:
            _check_keys(value, get_args(arguments[0]), place)
        _expect(type(value) is dict, value, "an object", place)
        return {_text(k): _fit(v, arguments[1], f"{place}.{k}") for k, v in value.items()}
    if origin is Literal:
        _expect(
            value in arguments and type(value) is str,
            value,
            f"one of {', '.join(map(repr, arguments))}",
            place,
        )
        return value
    if hint is float:
        if type(value) is str and value in _WORDS:
            return _WORDS[value]
        _expect(type(value) in (int, float), value, "a number, 'inf', '-inf' or 'nan'", place)
        try:
            return float(value)
        except OverflowError:
            raise RecordError(f"{place}: a number beyond any float") from None
    if hint is str:
        _expect(type(value) is str, value, "a string", place)
        return _text(value)
    _expect(type(value) is hint, value, "an integer" if hint is int else "true or false", place)
    return value


def _fit_object(value: Any, hint: Any, place: str) -> Any:
    hints = _hints(hint)
    _check_keys(value, hints, place)
    return {name: _fit(value[name], inner, f"{place}.{name}") for name, inner in hints.items()}


def _check_keys(value: Any, names: Any, place: str) -> None:
    _expect(type(value) is dict, value, "an object", place)
    for name in names:
        if name not in value:
            raise RecordError(f"{place}: the key {name!r} is missing")
    if len(value) > len(names):
        unknown = next(name for name in value if name not in names)
        raise RecordError(
            f"{place}: unknown key {_short(unknown)}; schema {SCHEMA} has {', '.join(names)}"
        )


def _expect(good: bool, value: Any, expected: str, place: str) -> None:
    if not good:
        raise RecordError(f"{_cut(place)}: got {_kind(value)}, expected {expected}")


def _text(value: str) -> str:
    """Make text that can be encoded: JSON may hold halves of surrogate pairs."""
    return value.encode("utf-8", "backslashreplace").decode()


def _kind(value: Any) -> str:
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _short(value)


def _short(value: Any) -> str:
    """Quote any value in a few words; `ascii`, so that nothing in it acts on a terminal."""
    if isinstance(value, list | dict):
        return _kind(value)
    if isinstance(value, int) and not -(10**30) < value < 10**30:
        return "an integer of over 30 digits"
    return _cut(ascii(value))


def _cut(text: str) -> str:
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:400])
    return text if len(text) <= 200 else f"{text[:200]}..."
