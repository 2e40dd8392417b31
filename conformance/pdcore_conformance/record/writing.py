"""The record of conformance runs: what ran where, how it ended, and how fast it was.

A record is one JSON file, declared by `pdcore_conformance.record.types` and described by
``docs/records.md``. It has one run for each backend and device.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import pdcore
from pdcore.cli.files import OutputError, replacing

from .compact import compacted
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
    ProcessEnd,
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
    "ProcessEnd",
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


#: Entries of a record, a run or its speed of which each item has a line of its own.
_LINE_BY_LINE = (
    "cases",
    "numerics",
    "ratios",
    "growth",
    "memory",
    "figures",
    "missing_peers",
)


def target(run: Run) -> str:
    """Return the backend and device of a run: ``torch:cpu``."""
    return f"{run['backend']}:{run['device']}"


def run_alone(run: Run, case: Case) -> str:
    """Return the command that runs one case alone, quoted for a shell."""
    grid = " --grid full" if run["grid"] == "full" else ""
    return f"pdcore conform {shlex.quote(target(run))}{grid} --case {shlex.quote(case['id'])}"


def new_run(backend: str, device: str) -> Run:
    """Return a new run of a backend: created now, at this commit, without cases and speed.

    Parameters
    ----------
    backend : str
        Its name.
    device : str
        Such as ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    Run
        Valid as it is. The caller fills in `environment`, `versions`, `precision` and
        `capabilities`.
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
    """Return the commit that pdcore is imported from, and whether its code differs from it.

    Returns
    -------
    commit : str or None
        Without a git checkout that of the variable PDCORE_COMMIT, see
        `pdcore_conformance.gpu.prepared`; None where that is not set, or git is not there.
    dirty : bool or None
        Whether tracked files outside of ``docs/``, which holds the records, differ. None where
        there is no commit.
    """
    named = os.environ.get("PDCORE_COMMIT")
    without_git = named, None if named is None else False
    root = Path(pdcore.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        # pdcore is installed: a repository around it, such as a project with its .venv, is not
        # pdcore's.
        return without_git
    # In a git hook these variables name the repository that the hook runs for.
    variables = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        completed = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=root,
            env=variables,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return completed.stdout.strip()

    try:
        changes = git("status", "--porcelain", "-uno", "--", ".", ":(exclude)docs")
        return git("rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.SubprocessError):
        return without_git


def save(
    path: str | os.PathLike[str],
    runs: Sequence[Run],
    *,
    replace: bool = False,
    compact: bool = False,
) -> None:
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
    compact : bool
        Whether to write the compact form, for a repository; see
        `pdcore_conformance.record.compact`.

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
    document = compacted(runs) if compact else {"schema": SCHEMA, "kind": KIND, "runs": runs}
    text = _layout("record", document) + "\n"
    with replacing(path, force=True) as stream:
        stream.write(text.encode("ascii"))


def _layout(name: str, value: Any) -> str:
    """Lay an entry out, for people and for diffs: a case, and a measurement, on each line."""
    if name in ("record", "run", "speed") and isinstance(value, Mapping):
        entries = [f"{json.dumps(key)}: {_layout(key, item)}" for key, item in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    if name == "runs":
        return "[\n" + ",\n".join(_layout("run", run) for run in value) + "\n]"
    if name in _LINE_BY_LINE and isinstance(value, list) and value:
        return "[\n" + ",\n".join(map(_json, value)) + "\n]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    """Return NumPy's numbers as Python's, and numbers that JSON lacks as words."""
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
    """Return one record of several, with one run for each backend and device.

    The later run replaces the earlier, by `created` and then by position. A run in which the
    backend was not available never replaces one in which it was, nor does a run of selected cases
    replace a run of all cases. Cases and speed may come from two runs: where one of the runs has
    no cases, or no speed, those of the other are kept, with a note.

    Parameters
    ----------
    records : sequence of Record
        As `load` returns them.
    say : callable
        Called with a sentence about each run that another replaces.

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
    """Return a key that sorts the runs of one backend: the last one replaces the others."""
    return run["available"], bool(run["cases"]), run["selection"] is None, run["created"]


def _combined(before: Run, after: Run, say: Callable[[str], None]) -> Run:
    kept, replaced = _description(after), _description(before)
    speed = before["speed"]
    # Speed is joined to the cases of another run only where it was measured without cases: speed
    # that was measured after older cases had passed is replaced together with them.
    is_separate = speed is not None and not before["cases"]
    is_newer = after["speed"] and after["created"] >= before["created"]
    if speed is None or not is_separate or is_newer:
        say(f"{target(after)}: {kept} replaces {replaced}")
        return after
    say(f"{target(after)}: the cases are those of {kept}, the speed is that of {replaced}")
    origin = (
        f"measured in another run than the cases: {replaced}, on {before['environment']['cpu']}"
    )
    notes = speed["notes"] if origin in speed["notes"] else [*speed["notes"], origin]
    return {**after, "speed": {**speed, "notes": notes}}


def _description(run: Run) -> str:
    text = f"the run of {run['created']}"
    if run["commit"]:
        text += f" at {run['commit'][:10]}"
    if not run["available"]:
        return f"{text} (not available)"
    if run["selection"] is not None:
        return f"{text} ({len(run['cases'])} selected cases)"
    return text
