"""A backend against a peer of another library, in processes that take turns.

Two frameworks in one process have thread pools in each other's way, and one alone may be faster
than it is beside the other. Here every turn is a process that loads one of them, computes the
workload once, times it, and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from pdcore.plugins import registered

from ..gpu.workers import variables
from ..record.environment import environment
from .grid import BOTH
from .peers import PEERS, Workload
from .speed import Bench
from .timing import interval, quartiles

__all__ = ["apart", "main", "timed"]


def timed(name: str, workload: Workload, repeat: int, threads: int) -> list[float]:
    """Time a backend or a peer by name, in this process; seconds a call."""
    peer = PEERS.get(name)
    library = registered()[name].library if peer is None else peer.library
    backend = (
        name if peer is None else next(n for n, b in registered().items() if b.library == library)
    )
    bench = Bench(backend, "cpu", "quick", [], threads)
    with bench.limited(), bench.framework.precision(workload.dtype):
        given = bench.arrays(workload, bench.framework)
        call = (
            bench.call(workload, *given)
            if peer is None
            else bench.peer_call(peer, workload, *given)
        )
        call()
        found = []
        for _ in range(repeat):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
    return found


def apart(
    names: Sequence[str], workload: Workload, *, rounds: int, repeat: int, threads: int
) -> dict[str, list[float]]:
    """Time some backends and peers in processes that take turns.

    Returns
    -------
    dict of str to list of float
        The median of every turn, in seconds; entries of the same place were measured next to one
        another.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            text = _run(
                "--worker",
                name,
                *_words(workload),
                "--repeat",
                str(repeat),
                "--threads",
                str(threads),
            )
            times[name].append(statistics.median(json.loads(text.splitlines()[-1])))
    return times


def _run(*words: str) -> str:
    command = [sys.executable, "-m", "pdcore_conformance.bench.apart", *words]
    done = subprocess.run(
        command, env=variables("cpu"), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {said}")
    return done.stdout


def _words(workload: Workload) -> list[str]:
    return [
        "--spec",
        workload.spec,
        "--shape",
        ",".join(map(str, workload.shape)),
        "--dtype",
        workload.dtype,
        "--direction",
        workload.direction,
    ]


def _shape(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(","))
    if len(found) != 4:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected B,H,N,D")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pdcore_conformance.bench.apart", description=__doc__
    )
    parser.add_argument("backend", nargs="?", default="jax", help="a backend (default: jax)")
    parser.add_argument(
        "--against",
        default="torch SDPA",
        choices=sorted(PEERS),
        metavar="PEER",
        help="a peer that runs on the CPU (default: torch SDPA)",
    )
    parser.add_argument("--spec", default="softmax")
    parser.add_argument("--shape", type=_shape, default=(1, 8, 4096, 64), metavar="B,H,N,D")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--direction", default=BOTH[0], choices=BOTH)
    parser.add_argument("--rounds", type=int, default=7, help="processes of each")
    parser.add_argument("--repeat", type=int, default=5, help="calls in a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; print the ratio and what it was measured on."""
    options = _parser().parse_args(arguments)
    shape: Any = options.shape
    workload = Workload(options.spec, shape, options.dtype, options.direction)
    if options.worker:
        print(json.dumps(timed(options.worker, workload, options.repeat, options.threads)))
        return 0
    where = environment()
    times = apart(
        (options.backend, options.against),
        workload,
        rounds=options.rounds,
        repeat=options.repeat,
        threads=options.threads,
    )
    pairs = zip(times[options.against], times[options.backend], strict=True)
    ratios = [theirs / ours for theirs, ours in pairs]
    low, middle, high = quartiles(ratios)
    ends = interval(ratios)
    print(f"{workload}, {options.threads} threads, {options.rounds} processes of each in turn")
    print(
        f"{options.backend} is {middle:.2f} times as fast as {options.against} "
        f"(quartiles {low:.2f} to {high:.2f}"
        + (")" if ends is None else f"; 95 % of the median {ends[0]:.2f} to {ends[1]:.2f})")
    )
    print(f"on {where['cpu']}, {where['cores']} cores, load {where['load']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
