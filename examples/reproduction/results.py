"""The file of results, which keeps every finished cell at once."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import ValidationError, convert

from pdcore.cli.files import FileError, OutputError, replacing
from pdcore_conformance.record.environment import environment, versions
from pdcore_conformance.record.writing import revision

from .declaration import CELLS, File
from .protocol import Cell

__all__ = ["Results", "setting"]

KIND, SCHEMA = "pdcore-reproduction", 1


class Results:
    """Figures by cell, with all that they depend on.

    Parameters
    ----------
    path : Path
        The path of the file.
    setting : mapping
        The setting, see `setting`. Figures of another setting are not used.

    Attributes
    ----------
    record : dict
        The content of the file.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self.path = path
        self.record: dict[str, Any] = {
            "kind": KIND,
            "schema": SCHEMA,
            "created": _now(),
            "updated": _now(),
            "commits": [],
            **setting,
            "data": {},
            "cells": {},
        }

    @property
    def cells(self) -> dict[str, Any]:
        """The figures, by the names of cells."""
        cells: dict[str, Any] = self.record["cells"]
        return cells

    @classmethod
    def open(
        cls,
        path: Path,
        setting: Mapping[str, Any],
        *,
        force: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> Results:
        """Return the results of a file, or new ones where there is none of this setting.

        A file of another protocol or version is kept, renamed to ``*.before.json`` or, where
        there is one, ``*.before-2.json`` and so on. Times and memory of another machine are
        dropped; trainings stay, as they depend on the machine by rounding only.

        Parameters
        ----------
        path, setting
            As in the class.
        force : bool
            Return new results even where a file exists.
        say : callable
            Called with the reason where a file is not used.

        Raises
        ------
        FileError
            When the file cannot be read, or is damaged or no file of results.
        """
        results = cls(path, setting)
        if force or not path.exists():
            return results
        record = _read(path)
        differing = [
            f"{part} {name}: {_short(record[part].get(name))}, now {_short(values.get(name))}"
            for part, values in setting.items()
            for name in {**values, **record[part]}
            if part != "machine"
            if record[part].get(name) != values.get(name)
        ]
        if differing:
            before = _free(path.with_suffix(".before.json"))
            try:
                os.replace(path, before)
            except OSError as error:
                raise OutputError(f"{before}: {error.strerror}") from error
            say(
                f"{path}: made with other settings ({'; '.join(differing)}), so this starts anew; "
                f"the old figures are in {before}"
            )
            return results
        results.record = record
        if record["machine"] != setting["machine"]:
            say(f"{path}: times and memory are measured anew, as they are of another machine")
            for cell in [c for c in results.cells if c.partition(" ")[0] in ("time", "memory")]:
                del results.cells[cell]
            record["machine"] = setting["machine"]
        return results

    def take(self, data: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Set the descriptions of the data sets; drop the figures of a set that has changed."""
        known = self.record["data"]
        for name, about in data.items():
            if name in known and known[name] != about:
                say(f"{self.path}: {name} has changed, so its figures are made anew")
                kinds = (f"tune {name} ", f"train {name} ")
                for cell in [c for c in self.cells if c.startswith(kinds)]:
                    del self.cells[cell]
        for name in [n for n in known if n not in data]:
            say(f"{self.path}: {name} is not given now; its figures are kept, but not shown")
        known.update(data)

    def keep(self, cell: Cell, figures: Mapping[str, Any]) -> None:
        """Add the figures of a cell, and write the file."""
        commit, dirty = revision()
        version = f"{commit}{', changed' if dirty else ''}" if commit else "unknown"
        if version not in self.record["commits"]:
            self.record["commits"].append(version)
        self.cells[cell.name] = dict(figures)
        self.record["updated"] = _now()
        self._save()

    def conclude(self, findings: Mapping[str, Any]) -> None:
        """Add the findings, and write the file."""
        self.record["findings"] = dict(findings)
        self._save()

    def _save(self) -> None:
        with replacing(self.path, force=True) as stream:
            text = json.dumps(self.record, indent=1, allow_nan=False)
            stream.write((text + "\n").encode())


def setting(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that figures depend on: protocol, versions, machine."""
    import torch

    where = environment()
    return {
        "protocol": dict(protocol),
        "versions": versions() | {"torch": str(torch.__version__)},
        "machine": {"cpu": where["cpu"], "cores": where["cores"], "platform": where["platform"]},
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a file, after checks against the declared types."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no figure")

    try:
        record = json.loads(path.read_bytes(), parse_constant=refuse)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: damaged: {error}; --force starts anew") from error
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise FileError(f"{path}: not results of examples/reproduce.py; --force writes over it")
    try:
        _check(record)
    except ValueError as error:
        raise FileError(f"{path}: damaged: {str(error)[:300]}; --force starts anew") from error
    return record


def _check(content: dict[str, Any]) -> None:
    """Raise a ValueError that names the place where the content is not as declared."""
    place = "$"
    try:
        convert(content, File)
        for name, figures in content["cells"].items():
            kind, _, rest = name.partition(" ")
            if kind not in CELLS or not rest:
                raise ValueError(f"$.cells: unknown cell {name[:100]!r}")
            place = f"$.cells[{name[:100]!r}]"
            convert(figures, CELLS[kind])
    except ValidationError as error:
        message, _, inner = str(error).partition(" - at ")
        raise ValueError(f"{place}{inner.strip('`').removeprefix('$')}: {message}") from None


def _free(path: Path) -> Path:
    """Return a path that does not exist, so that no figures are replaced."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain((path,), names) if not os.path.lexists(name))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
