"""Start, wait for and stop the processes of `pdcore_conformance.gpu`."""

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

__all__ = ["StageProcess", "StageProcesses", "core_count", "process_environment", "share_processes"]

_PACKAGES = ("pdcore", "pdcore_backends", "pdcore_conformance")
#: How much a case costs, relative to 1: JAX compiles a program for each case.
COSTS = {"jax": 6}
#: The least number of cases for a process, which takes seconds to import its framework.
LEAST = 10
#: Seconds between two reports of progress.
PACE = 20.0


class StageProcess:
    """A process that runs one stage for one target.

    Attributes
    ----------
    stage, target : str
        What the process runs, and for which backend and device.
    stopped : bool
        Whether the process was stopped by `stop`.
    """

    def __init__(
        self,
        stage: str,
        target: str,
        file: Path,
        job: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        self.stage, self.target, self.file, self.stopped = stage, target, file, False
        self.log = file.with_suffix(".log")
        description = file.with_suffix(".job")
        description.write_text(
            json.dumps({**job, "stage": stage.partition(".")[0], "file": str(file)}),
            encoding="utf-8",
        )
        file.unlink(missing_ok=True)
        with self.log.open("wb") as log:
            # A new process group, so that `stop` also stops its children.
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
        """Whether the process still runs."""
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        """Whether the process was stopped, or exited with another code than 0."""
        return self.stopped or self.process.poll() != 0

    def stop(self) -> None:
        """Stop the process and its children."""
        if not self.running:
            return
        self.stopped = True
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5.0)
                return

    def result(self) -> Any:
        """Return the JSON that the process has written, None where there is none."""
        try:
            return json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def run(self) -> Run | None:
        """Return the run that the process has recorded, None where there is none."""
        from ..record import writing as record

        try:
            return record.load(self.file)["runs"][0]
        except (OSError, record.RecordError, IndexError):
            return None

    def last_words(self) -> str:
        """Return why the process ended: its exit code and the last line that it printed."""
        if self.stopped:
            return "it was ended, because no time was left"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        text = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
        return f"exit code {self.process.poll()}: {text[:300]}"

    def progress(self) -> int:
        """Return the number of cases that the process reports to have run."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        counts = re.findall(r"^cases (\d+)$", text, re.MULTILINE)
        return int(counts[-1]) if counts else 0


class StageProcesses:
    """The processes of one session.

    Parameters
    ----------
    folder : Path
        For their jobs, logs and records.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "parts"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.all: list[StageProcess] = []

    def start(
        self, stage: str, target: str, job: Mapping[str, Any], environment: Mapping[str, str]
    ) -> StageProcess:
        """Start a process."""
        file = self.folder / f"{target.replace(':', '-')}.{stage}.json"
        process = StageProcess(stage, target, file, job, environment)
        self.all.append(process)
        return process

    def parts(self, target: str, stage: str) -> list[Path]:
        """List the partial records that the processes of a stage have written."""
        return sorted(self.folder.glob(f"{target.replace(':', '-')}.{stage}*.json"))

    def wait(
        self,
        processes: Iterable[StageProcess],
        seconds: float,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Wait for processes, and stop those that still run after so many seconds."""
        processes = list(processes)
        until = time.monotonic() + seconds
        reported = time.monotonic()
        while any(process.running for process in processes) and time.monotonic() < until:
            time.sleep(0.1)
            if time.monotonic() - reported > PACE:
                reported = time.monotonic()
                done: dict[str, int] = {}
                for process in processes:
                    done[process.target] = done.get(process.target, 0) + process.progress()
                say(", ".join(f"{target}: {count} cases" for target, count in done.items()))
        for process in processes:
            process.stop()

    def stop(self) -> None:
        """Stop every process that still runs."""
        for process in self.all:
            process.stop()


def core_count() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_processes(cases: Mapping[str, int], count: int) -> dict[str, int]:
    """Distribute processes over targets, in proportion to the cost of their cases.

    Parameters
    ----------
    cases : mapping of str to int
        The number of cases by target.
    count : int
        The number of processes; every target gets one, even if there are more targets.

    Returns
    -------
    dict of str to int
        The number of processes by target; targets without cases are left out.
    """
    weights = {t: n * COSTS.get(t.partition(":")[0], 1) for t, n in cases.items() if n}
    whole = sum(weights.values())
    return {
        target: max(1, min(count * weight // whole, -(-cases[target] // LEAST)))
        for target, weight in weights.items()
    }


def process_environment(device: str, *, threads: int | None = None) -> dict[str, str]:
    """Return the environment variables of a process.

    Parameters
    ----------
    device : str
        The device that the process uses.
    threads : int, optional
        The threads of the BLAS and of OpenMP, for one of many processes that measure no times.
        XLA then takes its first algorithm for a GPU instead of timing several, which would take
        longer than a case of the suite; the record states the flags. By default nothing is set.
    """
    variables = dict(os.environ)
    roots = [str(root) for root in _source_roots()]
    paths = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    variables["PYTHONPATH"] = os.pathsep.join([*roots, *(p for p in paths if p not in roots)])
    # A library that ends the process prints why, and the log must have it: pytest would capture it.
    variables["PYTEST_ADDOPTS"] = f"{variables.get('PYTEST_ADDOPTS', '')} --capture=no".strip()
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            variables[name] = str(threads)
        # PyTorch's compiler would start one process for every core.
        variables.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if device.partition(":")[0] != "cuda":
        return variables
    # Processes share the GPU: none may allocate all of its memory at the start.
    variables.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The programs that JAX has compiled are there for a resumed run.
    cache = Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdcore" / "jax"
    variables.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    variables.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = variables.get("XLA_FLAGS", "")
    if threads is not None and "xla_gpu_autotune_level" not in flags:
        variables["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    return variables


def _source_roots() -> list[Path]:
    """List the source folders of the packages that are not installed in site-packages."""
    folders = [
        Path(folder) for name in _PACKAGES for folder in importlib.import_module(name).__path__
    ]
    roots = dict.fromkeys(folder.resolve().parent for folder in folders)
    return [root for root in roots if root.name not in ("site-packages", "dist-packages")]
