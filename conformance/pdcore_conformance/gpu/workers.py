"""The processes of `pdcore_conformance.gpu`: started, waited for, and ended in time."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..record.writing import Run

__all__ = ["Work", "Workers", "cores", "shares", "variables"]

_PACKAGES = ("pdcore", "pdcore_backends", "pdcore_conformance")
#: What a case costs: JAX compiles a program for each.
COSTS = {"jax": 6}
#: At least so many cases for a process, which takes seconds to import its framework.
LEAST = 10
#: Seconds between two words about progress.
PACE = 20.0


class Work:
    """A process that does one job.

    Attributes
    ----------
    stage, target : str
        What it does.
    ended : bool
        Whether it was ended from outside.
    """

    def __init__(
        self,
        stage: str,
        target: str,
        file: Path,
        job: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        self.stage, self.target, self.file, self.ended = stage, target, file, False
        self.log = file.with_suffix(".log")
        description = file.with_suffix(".job")
        description.write_text(
            json.dumps({**job, "stage": stage.partition(".")[0], "file": str(file)}),
            encoding="utf-8",
        )
        file.unlink(missing_ok=True)
        with self.log.open("wb") as log:
            # A group of its own, so that what it starts ends with it.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pdcore_conformance.gpu.stage", str(description)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it has not come to its end."""
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than by itself and well."""
        return self.ended or self.process.poll() != 0

    def end(self) -> None:
        """End it, and what it has started."""
        if not self.running:
            return
        self.ended = True
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5.0)
                return

    def found(self) -> Any:
        """Give the JSON that it has written, None for none."""
        try:
            return json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def run(self) -> Run | None:
        """Give the run that it has recorded, None for none."""
        from ..record import writing as record

        try:
            return record.load(self.file)["runs"][0]
        except (OSError, record.RecordError, IndexError):
            return None

    def last_words(self) -> str:
        """Say how it ended, by the last line that it printed."""
        if self.ended:
            return "it was ended, because no time was left"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        text = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
        return f"exit code {self.process.poll()}: {text[:300]}"

    def progress(self) -> int:
        """Give the number of cases that it says it has run."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        counts = re.findall(r"^cases (\d+)$", text, re.MULTILINE)
        return int(counts[-1]) if counts else 0


class Workers:
    """The processes of one session.

    Parameters
    ----------
    folder : Path
        For their jobs, logs and records.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "parts"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.all: list[Work] = []

    def start(
        self, stage: str, target: str, job: Mapping[str, Any], environment: Mapping[str, str]
    ) -> Work:
        """Start a process."""
        file = self.folder / f"{target.replace(':', '-')}.{stage}.json"
        work = Work(stage, target, file, job, environment)
        self.all.append(work)
        return work

    def parts(self, target: str, stage: str) -> list[Path]:
        """List the records that processes have left of a stage."""
        return sorted(self.folder.glob(f"{target.replace(':', '-')}.{stage}*.json"))

    def wait(
        self, works: Iterable[Work], seconds: float, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Wait for processes, and end those that are not through after so many seconds."""
        works = list(works)
        until = time.monotonic() + seconds
        spoken = time.monotonic()
        while any(work.running for work in works) and time.monotonic() < until:
            time.sleep(0.1)
            if time.monotonic() - spoken > PACE:
                spoken = time.monotonic()
                done: dict[str, int] = {}
                for work in works:
                    done[work.target] = done.get(work.target, 0) + work.progress()
                say(", ".join(f"{target}: {count} cases" for target, count in done.items()))
        for work in works:
            work.end()

    def end(self) -> None:
        """End whatever still runs."""
        for work in self.all:
            work.end()


def cores() -> int:
    """Count the cores of this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def shares(cases: Mapping[str, int], count: int) -> dict[str, int]:
    """Share processes out among targets, by what their cases cost.

    Parameters
    ----------
    cases : mapping of str to int
        The number of cases by target.
    count : int
        Processes in all; every target gets one, even if these are fewer.

    Returns
    -------
    dict of str to int
        Processes by target; none for a target without cases.
    """
    weights = {t: n * COSTS.get(t.partition(":")[0], 1) for t, n in cases.items() if n}
    whole = sum(weights.values())
    return {
        target: max(1, min(count * weight // whole, -(-cases[target] // LEAST)))
        for target, weight in weights.items()
    }


def variables(device: str, *, threads: int | None = None) -> dict[str, str]:
    """Give the environment of a process.

    Parameters
    ----------
    device : str
        Where it is to run.
    threads : int, optional
        Of the BLAS and OpenMP, for a process that is one of many and measures no times. XLA then
        takes the first algorithm that it has for a GPU instead of timing several, which would
        take longer than a case of the suite; its flags are in the record. As they are by default.
    """
    found = dict(os.environ)
    roots = [str(root) for root in _roots()]
    given = [path for path in found.get("PYTHONPATH", "").split(os.pathsep) if path]
    found["PYTHONPATH"] = os.pathsep.join([*roots, *(p for p in given if p not in roots)])
    # What a library says before it ends the process is its last word; nobody else would print it.
    found["PYTEST_ADDOPTS"] = f"{found.get('PYTEST_ADDOPTS', '')} --capture=no".strip()
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            found[name] = str(threads)
        # Likewise of PyTorch's compiler, which would start one for every core.
        found.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if device.partition(":")[0] != "cuda":
        return found
    # Processes share the GPU: none may take all of its memory beforehand.
    found.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # What JAX has compiled is there when a session goes on.
    cache = Path(found.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdcore" / "jax"
    found.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    found.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = found.get("XLA_FLAGS", "")
    if threads is not None and "xla_gpu_autotune_level" not in flags:
        found["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    return found


def _roots() -> list[Path]:
    """Find the folders of a checkout, where the packages come from one and are not installed."""
    folders = [
        Path(folder) for name in _PACKAGES for folder in importlib.import_module(name).__path__
    ]
    found = dict.fromkeys(folder.resolve().parent for folder in folders)
    return [root for root in found if root.name not in ("site-packages", "dist-packages")]
