"""The process that runs steps of a stage for one backend, and writes a journal of them.

The journal is that of `pdcore_conformance.runner.child`: a name is written before its step begins,
so that whatever ends the process, the journal says in which step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdcore.plugins import registered

from ..frameworks import framework
from ..judge.nonconforming import Nonconforming
from ..runner.child import JournalFile
from ..runner.outcomes import new_case, plain
from ..runner.plugin import parse_backend
from .step import NotHere, Step, case_of
from .steps import step_of
from .tools import end_tool

if TYPE_CHECKING:
    from ..record.writing import Case

__all__ = ["main", "run_step"]


def main(path: str, options: dict[str, Any]) -> None:
    """Run the steps, and write the journal."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    journal = JournalFile(path)
    stage, target, names = options["stage"], options["target"], options["cases"]
    journal.write(planned=[{"id": case_of(stage, name)} for name in names])
    backend, device = parse_backend(target)
    library = framework(registered()[backend].library)
    step = step_of(stage, target, options["seconds"])
    for name in names:
        journal.write(began=case_of(stage, name), printed=os.fstat(sys.stdout.fileno()).st_size)
        case, found = run_step(stage, name, step)
        journal.write(done=case, found=found)
        journal.end_where_lost(case, library, device)
    journal.write(code=0)


def run_step(stage: str, name: str, step: Step) -> tuple[Case, dict[str, Any]]:
    """Run a step; return its case for the record, and what it found."""
    case = new_case(case_of(stage, name), "optional", [], "passed")
    found: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        evidence, found = step(name)
    except NotHere as reason:
        case["outcome"], case["message"] = "not claimed", str(reason)
    except Nonconforming as error:
        case["outcome"], case["message"] = "failed", str(error)[:4000]
        found = getattr(error, "found", {})
    except Exception as error:  # noqa: BLE001 - the other steps go on
        case["outcome"], case["message"] = "error", f"{type(error).__name__}: {error}"[:4000]
        found = getattr(error, "found", {})
    else:
        if evidence is not None:
            judged = plain(evidence)
            case["verdicts"], case["ratio"] = judged["verdicts"], judged["ratio"]
    case["seconds"] = time.perf_counter() - started
    return case, found


def _end(number: int, frame: object) -> None:
    """End at a signal; an exception might be caught, and written as the end of the step."""
    end_tool()
    os._exit(128 + number)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
