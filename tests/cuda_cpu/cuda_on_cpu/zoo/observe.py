"""Find the detectors of a defect: checks, results, schedules and sanitizers."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..module import EmulationError, Kernel, RawModule
from ..settings import SCHEDULES, environment, using
from .registry import DEFECTS, Defect

__all__ = ["DETECTORS", "observe"]

DETECTORS = {
    "launch": "the checks before a launch",
    "check": "the checks while threads run",
    "result": "a wrong or NaN result, under the lockstep schedule",
    "schedule": "a wrong or NaN result under another schedule only",
    "address": "AddressSanitizer",
    "undefined": "UndefinedBehaviorSanitizer",
    "thread": "ThreadSanitizer",
}
_REPORTS = {
    "address": {"address": "ERROR: AddressSanitizer", "undefined": ": runtime error: "},
    "thread": {"thread": "WARNING: ThreadSanitizer: data race"},
}
#: By defect: the detectors that report it ("planted"), and those that report the same kernel
#: without the defect ("correct").
Caught = dict[str, dict[str, list[str]]]
_RUNS = [(schedule, 0) for schedule in SCHEDULES] + [("random", 1), ("random", 2)]


def _kernels_folder() -> Path:
    """Return the folder of ptx.cuh, which belongs to pdcore's CuPy backend."""
    spec = importlib.util.find_spec("pdcore_backends.cupy")
    if spec is None or spec.origin is None:
        raise RuntimeError("the defects use pdcore's kernels/ptx.cuh; install pdcore")
    return Path(spec.origin).parent / "kernels"


@functools.cache
def _module(source: str) -> RawModule:
    code = Path(__file__).with_name(source).read_text("utf-8")
    names = [
        f"{defect.name}<{planted}>"
        for defect in DEFECTS.values()
        for planted in ("true", "false")
        if defect.source == source and defect.launch is None
    ]
    return RawModule(code, options=(f"-I{_kernels_folder()}",), name_expressions=names)


def _kernel(defect: Defect, planted: bool) -> Kernel:
    name = "scale" if defect.launch else f"{defect.name}<{str(planted).lower()}>"
    return _module(defect.source).get_function(name)


def _run(defect: Defect, planted: bool) -> bool:
    """Run once; return whether the results are right."""
    arguments, expected = defect.case()
    launch = (defect.grid, defect.block, arguments, defect.shared)
    if planted and defect.launch:
        launch = defect.launch(*launch)
    grid, block, args, shared = launch
    _kernel(defect, planted)(grid, block, args, shared_mem=shared)
    return all(
        np.allclose(args[place], value, rtol=1e-5, atol=1e-5) for place, value in expected.items()
    )


def _plain(defect: Defect, planted: bool) -> set[str]:
    caught: set[str] = set()
    wrong = []
    for schedule, seed in _RUNS:
        with using(schedule=schedule, seed=seed):
            try:
                if not _run(defect, planted):
                    wrong.append(schedule)
            except EmulationError:
                caught.add("check")
            except (TypeError, ValueError):
                caught.add("launch")
    if wrong:
        caught.add("result" if "lockstep" in wrong else "schedule")
    return caught


def _attempt(defects: Sequence[Defect], planted: bool) -> None:
    for defect in defects:
        with suppress(EmulationError):
            _run(defect, planted)


def _reports(defects: Sequence[Defect], planted: bool, sanitize: str) -> set[str]:
    """Return the detectors whose reports the sanitizer prints to standard error."""
    status = 0
    with tempfile.TemporaryFile() as output:
        stderr = os.dup(2)
        os.dup2(output.fileno(), 2)
        try:
            if sanitize == "address":
                status = _in_a_child(lambda: _attempt(defects, planted))
            else:
                _attempt(defects, planted)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if status not in (0, 1):  # AddressSanitizer exits with 1
        names = ", ".join(defect.name for defect in defects)
        raise RuntimeError(f"{names} ended with status {status}:\n{text}")
    return {name for name, report in _REPORTS[sanitize].items() if report in text}


def _in_a_child(run: Callable[[], None]) -> int:
    """Run a function in a child process, which AddressSanitizer may end; return its status."""
    child = os.fork()
    if not child:
        done = False
        try:
            run()
            done = True
        except Exception:
            traceback.print_exc()
            raise
        finally:
            os._exit(0 if done else 2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _sanitized(defects: Sequence[Defect], sanitize: str) -> Caught:
    """Return what catches the defects; of a launch that is refused, nothing runs."""
    run = [defect for defect in defects if defect.launch is None]
    found: Caught = {defect.name: {"planted": [], "correct": []} for defect in defects}
    for source in {defect.source for defect in run}:
        _module(source).compile()  # here, for all children
    for defect in run:
        found[defect.name]["planted"] = sorted(_reports([defect], True, sanitize))
    if _reports(run, False, sanitize):
        for defect in run:
            found[defect.name]["correct"] = sorted(_reports([defect], False, sanitize))
    return found


def _here(names: Iterable[str], sanitize: str) -> Caught:
    defects = [DEFECTS[name] for name in names]
    if sanitize:
        return _sanitized(defects, sanitize)
    return {
        defect.name: {
            "planted": sorted(_plain(defect, True)),
            "correct": sorted(_plain(defect, False)),
        }
        for defect in defects
    }


def observe(sanitize: str = "", names: Iterable[str] = tuple(DEFECTS)) -> Caught:
    """Return, by defect, what catches it (``"planted"``) and what its twin (``"correct"``).

    With a sanitizer, in a process of its own.
    """
    if not sanitize:
        return _here(names, "")
    variables = environment(sanitize)
    # A report does not end the process, nor stand for another one at the same address.
    variables["UBSAN_OPTIONS"] = "halt_on_error=0"
    variables["TSAN_OPTIONS"] = "exitcode=0:suppress_equal_addresses=0"
    command = [sys.executable, "-m", __name__, sanitize, *names]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: Caught = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(_here(sys.argv[2:], sys.argv[1])))
