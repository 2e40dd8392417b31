"""The record of conformance runs: what ran where, how it ended, and how fast it was.

A record is one JSON file, described by ``record.schema.json`` beside this module and by
``docs/records.md``. It has one run for each backend and device. Writing one needs no optional
package.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import pdcore
from pdcore.cli.files import OutputError, replacing

from .reading import RecordError, is_record, load
from .types import (
    KIND,
    OUTCOMES,
    SCHEMA,
    Case,
    Environment,
    Figure,
    Gpu,
    Growth,
    Memory,
    MissingPeer,
    Numerics,
    Outcome,
    Ratio,
    Record,
    Run,
    Speed,
    Verdict,
)

__all__ = [
    "KIND",
    "OUTCOMES",
    "SCHEMA",
    "Case",
    "Environment",
    "Figure",
    "Gpu",
    "Growth",
    "Memory",
    "MissingPeer",
    "Numerics",
    "Outcome",
    "Ratio",
    "Record",
    "RecordError",
    "Run",
    "Speed",
    "Verdict",
    "load",
    "merge",
    "new_run",
    "revision",
    "run_alone",
    "save",
    "target",
]


def target(run: Run) -> str:
    """Name what a run is about: ``torch:cpu``."""
    return f"{run['backend']}:{run['device']}"


def run_alone(run: Run, case: Case) -> str:
    """Give the command that runs one case alone, quoted for a shell."""
    grid = " --grid full" if run["grid"] == "full" else ""
    return f"pdcore conform {shlex.quote(target(run))}{grid} --case {shlex.quote(case['id'])}"


def new_run(backend: str, device: str) -> Run:
    """Start the run of a backend: created now, at this commit, with nothing in it yet.

    Parameters
    ----------
    backend : str
        Its name.
    device : str
        Such as ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    Run
        Valid as it is. `environment`, `versions`, `precision` and `capabilities` are to be filled
        in by whoever knows them.
    """
    commit, dirty = revision()
    return {
        "backend": backend,
        "device": device,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "dirty": dirty,
        "level": "all",
        "grid": "quick",
        "selection": None,
        "available": True,
        "reason": None,
        "versions": {"pdcore": pdcore.__version__},
        "environment": {
            "cpu": "unknown",
            "cores": os.cpu_count() or 1,
            "threads": None,
            "blas": None,
            "load": None,
            "memory_gib": None,
            "platform": "unknown",
            "gpu": None,
        },
        "precision": "",
        "capabilities": {},
        "counts": dict.fromkeys(OUTCOMES, 0),
        "seconds": 0.0,
        "cases": [],
        "speed": None,
    }


def revision() -> tuple[str | None, bool | None]:
    """Look up the commit that pdcore is imported from, and whether tracked files differ from it.

    Returns
    -------
    commit : str or None
        None where pdcore is installed, is no git checkout, or git is not there.
    dirty : bool or None
        None where there is no commit.
    """
    root = Path(pdcore.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        # Installed: an enclosing repository, such as a project with its .venv, is another's.
        return None, None
    # In a git hook these name whichever repository the hook runs for.
    variables = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=root,
            env=variables,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return found.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def save(path: str | os.PathLike[str], runs: Sequence[Run], *, replace: bool = False) -> None:
    """Write a record; it appears whole, or not at all.

    Parameters
    ----------
    path : path
        Where to. A record (or an empty file) that is there is replaced.
    runs : sequence of Run
        What it holds. Nothing is checked here, so that no figure of a long run is lost; `load`
        checks.
    replace : bool
        Whether to replace also a file that is not a record.

    Raises
    ------
    OutputError
        When `path` is not a record and `replace` is not set, is no regular file, or cannot be
        written.
    TypeError
        When a run holds what JSON cannot.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size and not replace and not is_record(path):
        raise OutputError(f"{path}: exists and is not a conformance record; choose another name")
    text = "".join(_lines(runs))
    with replacing(path, force=True) as stream:
        stream.write(text.encode("ascii"))


def _lines(runs: Sequence[Run]) -> Iterator[str]:
    """Lay a record out with a case on each line, for people and for diffs."""
    yield f'{{"schema": {SCHEMA}, "kind": "{KIND}", "runs": ['
    for number, run in enumerate(runs):
        yield ",\n{" if number else "\n{"
        for index, (name, value) in enumerate(run.items()):
            yield ",\n" if index else "\n"
            yield f"{json.dumps(name)}: "
            if name == "cases" and isinstance(value, list) and value:
                yield "[\n" + ",\n".join(map(_json, value)) + "\n]"
            else:
                yield _json(value)
        yield "\n}"
    yield "\n]}\n"


def _json(value: Any) -> str:
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    """Turn NumPy's numbers into Python's, and what JSON has no number for into a word."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not abs(value) < float("inf"):
        return "nan" if value != value else "inf" if value > 0 else "-inf"
    return value


def merge(records: Sequence[Record], say: Callable[[str], None] = lambda text: None) -> Record:
    """Make one record of several, with one run for each backend and device.

    The later run takes the place of the earlier, by `created` and then by position; but a run in
    which the backend was not available, or only some cases were selected, never takes the place
    of one in which it was, or all were. Cases and speed may come from two runs: where one of them
    has no cases, or no speed, the other's are kept, with a note.

    Parameters
    ----------
    records : sequence of Record
        Whatever `load` or `save` know.
    say : callable
        Is told of each run that gives way to another.

    Returns
    -------
    Record
        Its runs in the order in which their backends first appear.
    """
    chosen: dict[str, Run] = {}
    for run in (run for record in records for run in record["runs"]):
        name = target(run)
        if name not in chosen:
            chosen[name] = run
            continue
        before, after = sorted((chosen[name], run), key=_standing)
        chosen[name] = _combined(before, after, say)
    return {"schema": SCHEMA, "kind": KIND, "runs": list(chosen.values())}


def _standing(run: Run) -> tuple[bool, bool, bool, str]:
    """Order runs of one backend; what has no cases at all comes before what has."""
    return run["available"], bool(run["cases"]), run["selection"] is None, run["created"]


def _combined(before: Run, after: Run, say: Callable[[str], None]) -> Run:
    kept, gone = _described(after), _described(before)
    speed = before["speed"]
    # Only a run of nothing but measurements lends its speed to another's cases: figures that were
    # gated by older cases go with them.
    lends = speed is not None and not before["cases"]
    if speed is None or not lends or (after["speed"] and after["created"] >= before["created"]):
        say(f"{target(after)}: {kept} replaces {gone}")
        return after
    say(f"{target(after)}: the cases are those of {kept}, the speed is that of {gone}")
    origin = f"measured in another run than the cases: {gone}, on {before['environment']['cpu']}"
    notes = speed["notes"] if origin in speed["notes"] else [*speed["notes"], origin]
    return {**after, "speed": {**speed, "notes": notes}}


def _described(run: Run) -> str:
    text = f"the run of {run['created']}"
    if run["commit"]:
        text += f" at {run['commit'][:10]}"
    if not run["available"]:
        return f"{text} (not available)"
    if run["selection"] is not None:
        return f"{text} ({len(run['cases'])} selected cases)"
    return text
