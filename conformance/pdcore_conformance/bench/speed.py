"""Measure the speed and memory of a backend, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .figures import FIGURES
from .grid import workloads
from .measurements import Bench, left_out, unmeasured
from .peers import choose_peers

if TYPE_CHECKING:
    from ..record.writing import Speed

__all__ = ["Steps", "measure", "steps", "unmeasured"]

#: The steps of a measurement, in order, by title.
Steps = list[tuple[str, Callable[[], None]]]


def measure(
    backend: str,
    device: str | None = None,
    *,
    grid: str = "quick",
    peers: Sequence[str] | None = None,
    threads: int = 2,
    say: Callable[[str, float], None] = lambda title, share: None,
    keep: Callable[[Speed], None] = lambda speed: None,
    deadline: float | None = None,
    earlier: Speed | None = None,
    listed: Callable[[Bench], Steps] | None = None,
) -> Speed:
    """Measure a backend: against peers, against softmax, growth, memory, overhead and import.

    Parameters
    ----------
    backend : str
        The name of the backend.
    device : str, optional
        The device; by default the first that the backend declares.
    grid : {"quick", "full", "table"}
        Shorter sequences and fewer rounds, or all of it. Most targets are stated for the full
        length, and not judged on the quick grid. The steps of a `.rows` table are of "table".
    peers : sequence of str, optional
        Names of `pdcore_conformance.bench.peers.PEERS`; all of them by default.
    threads : int
        The threads of the BLAS, of the NumPy backend, of PyTorch and of onnxruntime.
    say : callable
        Called before each step with its title and the share of the steps that are done.
    keep : callable
        Called before each step with the measurements so far, whose ``notes`` list the other steps
        as not measured, so that a process that is stopped can leave a record.
    deadline : float, optional
        Seconds after which no step is started; ``notes`` list the steps that are left out.
    earlier : Speed, optional
        The result of an earlier call with the same arguments. Only the steps that its ``notes``
        list as not measured are run, and added to it.
    listed : callable, optional
        From the `Bench` to the steps; `steps` by default.

    Returns
    -------
    Speed
        See `pdcore_conformance.record`. There are no figures where ``red`` is true.
    """
    bench = Bench(backend, device, grid, choose_peers(peers), threads)
    started = time.perf_counter()
    with bench.limited_threads():
        todo = (listed or steps)(bench)
        if earlier is not None:
            rest = unmeasured(earlier)
            todo = [step for step in todo if step[0] in rest]
            bench.resume(earlier)
        for index, (title, step) in enumerate(todo):
            say(title, index / len(todo))
            late = deadline is not None and time.perf_counter() - started > deadline
            if late or bench.speed["red"]:
                why = "no time was left" if late else "the numerics are red"
                bench.speed["notes"].append(left_out(why, title))
            else:
                keep(bench.so_far([name for name, _ in todo[index:]], started))
                step()
    say("done", 1.0)
    return bench.so_far([], started)


def steps(bench: Bench) -> Steps:
    """List the steps of a measurement, by title, in order."""
    listed: Steps = []
    for workload in workloads(bench.backend, bench.device, bench.grid):
        if bench.runs(workload):
            listed.append((str(workload), lambda w=workload: bench.against_peers(w)))  # type: ignore[misc]
    return listed + [(title, lambda f=figure: f(bench)) for title, figure in FIGURES.items()]
