"""Compare a backend with a peer of another library, each in its own processes, in turn.

Two frameworks in one process slow each other down by their thread pools. Here every process loads
one framework, computes the workload once, times it, and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from pdcore.plugins import registered

from ..gpu.environment import process_environment
from ..record.environment import environment
from .measurements import Bench
from .peers import PEERS
from .timing import interval, quartiles
from .workload import DIRECTIONS, Shape, Workload, parsed_shape

__all__ = ["main", "time_here", "times_apart"]


def time_here(name: str, workload: Workload, repeat: int, threads: int) -> list[float]:
    """Return the seconds of each of `repeat` calls of a backend or peer in this process."""
    peer = PEERS.get(name)
    library = registered()[name].library if peer is None else peer.library
    backend = (
        name if peer is None else next(n for n, b in registered().items() if b.library == library)
    )
    bench = Bench(backend, "cpu", "quick", [], threads)
    with bench.limited_threads(), bench.framework.precision(workload.dtype):
        arrays = bench.arrays(workload, bench.framework)
        call = (
            bench.call(workload, *arrays)
            if peer is None
            else bench.peer_call(peer, workload, *arrays)
        )
        call()
        seconds = []
        for _ in range(repeat):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return seconds


def times_apart(
    names: Sequence[str], workload: Workload, *, rounds: int, repeat: int, threads: int
) -> dict[str, list[float]]:
    """Time some backends and peers, each in its own processes, in turn.

    Returns
    -------
    dict of str to list of float
        The median of every process, in seconds; entries with the same index were measured one
        after the other.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            output = _run(
                "--worker",
                name,
                *_options(workload),
                "--repeat",
                str(repeat),
                "--threads",
                str(threads),
            )
            times[name].append(statistics.median(json.loads(output.splitlines()[-1])))
    return times


def _run(*arguments: str) -> str:
    """Run this module in a new process and return its output."""
    command = [sys.executable, "-m", "pdcore_conformance.bench.apart", *arguments]
    done = subprocess.run(
        command, env=process_environment("cpu"), capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = done.stderr[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {errors}")
    return done.stdout


def _options(workload: Workload) -> list[str]:
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


def _shape(text: str) -> Shape:
    try:
        return parsed_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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
    parser.add_argument("--direction", default=DIRECTIONS[0], choices=DIRECTIONS)
    parser.add_argument("--rounds", type=int, default=7, help="processes for each of the two")
    parser.add_argument("--repeat", type=int, default=5, help="calls in a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: print the ratio, and the machine on which it was measured."""
    options = _parser().parse_args(arguments)
    workload = Workload(options.spec, options.shape, options.dtype, options.direction)
    if options.worker:
        print(json.dumps(time_here(options.worker, workload, options.repeat, options.threads)))
        return 0
    machine = environment()
    times = times_apart(
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
    print(f"on {machine['cpu']}, {machine['cores']} cores, load {machine['load']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
