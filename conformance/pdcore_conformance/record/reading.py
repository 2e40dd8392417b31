"""Reading a record: whatever the file holds, the result is a record or a `RecordError`."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from . import compact
from .checking import RecordError, check, check_sums, converted
from .quoting import encodable, kind_of, quoted
from .types import KIND, SCHEMA, Record

__all__ = ["LIMIT", "RecordError", "is_record", "load"]

#: In bytes. No honest record comes near it: 3,000 cases are about 1.5 MB.
LIMIT = 64 << 20


def load(path: str | Path) -> Record:
    """Read a record.

    Parameters
    ----------
    path : path
        A file that `save` wrote, in either form, or that follows the schema.

    Returns
    -------
    Record
        Checked against the declared types and against itself.

    Raises
    ------
    RecordError
        Naming the file and what is wrong with it; for a violation, where.
    """
    path = Path(path)
    content = _parse(path, _read(path))
    if not _has_kind(content):
        what = (
            f"kind {quoted(content.get('kind'))}" if isinstance(content, dict) else kind_of(content)
        )
        raise RecordError(
            f"{path}: not a conformance record: got {what}, expected an object "
            f"of kind {KIND!r}, as `pdcore conform --report` writes"
        )
    number = content.get("schema")
    if type(number) is int and number > SCHEMA:
        raise RecordError(
            f"{path}: written in schema {quoted(number)}, and this pdcore reads up "
            f"to {SCHEMA}: upgrade pdcore"
        )
    try:
        return _check_compact(content) if content["kind"] == compact.KIND else check(content)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None
    except RecursionError:
        raise RecordError(f"{path}: nested too deeply, which no record is") from None


def is_record(path: Path) -> bool:
    """Return whether a file is a record of any version, whole and legible."""
    try:
        return _has_kind(_parse(path, _read(path)))
    except RecordError:
        return False


def _has_kind(content: Any) -> bool:
    return isinstance(content, dict) and content.get("kind") in (KIND, compact.KIND)


def _check_compact(content: Any) -> Record:
    document: compact.CompactRecord = converted(content, compact.CompactRecord)
    expected = len(document["runs"])
    for index, (*_, results) in enumerate(document["cases"]):
        if len(results) != expected:
            raise RecordError(
                f"$.cases[{index}][3]: got {len(results)} results, expected one for each of the "
                f"{expected} runs"
            )
    record = compact.expanded(document)
    check_sums(record)
    return record


def _read(path: Path) -> str:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise RecordError(f"{path}: is a directory, expected a record (a JSON file)")
        if not stat.S_ISREG(status.st_mode):
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
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        # Only an escape can bring half of a surrogate pair into UTF-8 text.
        return encodable(content) if "\\ud" in text.lower() else content
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


def _refuse_constant(word: str) -> Any:
    raise RecordError(
        f"not JSON: it holds the bare word {word}; a record writes it as the string "
        f"{word.replace('Infinity', 'inf').lower()!r}"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise RecordError(f"damaged: the key {quoted(twice)} is twice in one object")
    return entries
