"""The log of a run, a line for each thing that begins and ends, and the archive of all results."""

from __future__ import annotations

import json
import os
import tarfile
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pdcore.cli.files import replacing

__all__ = ["LIMIT", "Log", "archive", "entries"]

#: The most bytes of the archive.
LIMIT = 16 * 10**6


class Log:
    """The file ``log.jsonl`` of a folder, to which one process appends.

    Each line is an object with the seconds since the start (``at``), and one of: the run
    (``commit``...); a step of a ``stage`` for a ``target`` that ``began``, is ``done``, or was
    ``cut`` because the time was over; or what was ``said``.
    """

    def __init__(self, folder: Path, commit: str | None, **about: Any) -> None:
        self.path = folder / "log.jsonl"
        self.started = time.monotonic()
        self._lock = threading.Lock()
        self.created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("\n")  # a line that was cut
        self.write(created=self.created, commit=commit, **about)

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self.started

    def write(self, **entry: Any) -> None:
        """Append a line, which is in the file when this returns."""
        line = json.dumps({"at": round(self.seconds, 2), **entry}, default=lambda x: x.item())
        with self._lock, self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def say(self, text: str, **entry: Any) -> None:
        """Print a line, and append it."""
        print(f"{self.seconds:6.1f} s  {text}", flush=True)
        self.write(said=text, **entry)


def entries(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log; those that were cut are left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def archive(folder: Path, path: Path) -> list[str]:
    """Pack the files of a folder into one archive, which appears whole; return what is left out.

    The largest files are left out until the archive is within `LIMIT`, the log and the record last.
    """
    files = sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.stat().st_size)
    files.sort(key=lambda p: p.name not in ("log.jsonl", "record.json"))
    left_out: list[str] = []
    while True:
        with (
            replacing(path, force=True) as stream,
            tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as pack,
        ):
            for file in files:
                pack.add(file, f"{folder.name}/{file.name}")
        if path.stat().st_size < LIMIT or len(files) <= 1:
            return left_out
        left_out.append(files.pop().name)
