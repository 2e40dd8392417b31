"""What each step of a stage does, in the process of `.worker`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pdcore.plugins import load_backend

from ..bench.measurements import Bench
from ..bench.peers import PEERS
from ..frameworks import framework
from ..judge.nonconforming import Nonconforming
from ..record.environment import environment, versions
from ..runner.plugin import parse_backend
from . import calls, ptx_wrappers, tools
from .stages import workloads
from .step import Found, NotHere, Step
from .variants import variant_steps

__all__ = ["step_of"]


def step_of(stage: str, target: str, seconds: float) -> Step:
    """Return what a stage does for a target, from the name of a step; `seconds` are left for it."""
    return _STEPS[stage](target, seconds)


def _machine(target: str, seconds: float) -> Step:
    def step(name: str) -> Found:
        backend, device = parse_backend(target)
        runner = load_backend(backend)
        library = framework(runner.info.library)
        if reason := library.available(device):
            raise NotHere(reason)
        return None, {
            "environment": environment(device),
            "versions": versions() | runner.versions(),
            "precision": library.policy(),
        }

    return step


def _rates(target: str, seconds: float) -> Step:
    def step(name: str) -> Found:
        from ..bench import rates

        bench = _bench(target)
        sizes = (
            rates.Sizes() if bench.on_gpu else rates.Sizes(dtype="float32", copied=2**24, side=512)
        )
        with bench.framework.precision(sizes.dtype):
            rates.copy_rate(bench, sizes)
            rates.product_rate(bench, sizes)
        return None, {"speed": bench.speed}

    return step


def _wrappers(target: str, seconds: float) -> Step:
    known = {check.name: check for check in ptx_wrappers.checks()}
    device: dict[str, Any] = {}

    def step(name: str) -> Found:
        if framework("cupy").available("cuda"):
            raise NotHere("the wrappers run by CuPy on a GPU")
        if not device:
            device.update(ptx_wrappers.compiled())
        check = known[name]
        if device["capability"] < check.capability:
            raise NotHere(f"the device has compute capability {device['capability'] / 10}")
        arguments = {name: value for name, value in device.items() if name != "capability"}
        if message := ptx_wrappers.difference(check, **arguments):
            raise Nonconforming(message)
        return None, {}

    return step


def _judged(known: Mapping[str, calls.Judged]) -> Callable[[str, float], Step]:
    def of(target: str, seconds: float) -> Step:
        return lambda name: calls.judge(target, known[name])

    return of


def _speed(target: str, seconds: float) -> Step:
    known = {str(workload): workload for workload in workloads(target.partition(":")[2])}

    def step(name: str) -> Found:
        bench = _bench(target)
        if not bench.runs(known[name]):
            raise NotHere(f"{target} does not run it")
        return _measured(bench, lambda: bench.against_peers(known[name]))

    return step


def _variants(target: str, seconds: float) -> Step:
    backend, _, device = target.partition(":")
    known = variant_steps(backend, device)

    def step(name: str) -> Found:
        variant, workload = known[name]
        bench = _bench(target, ())
        return _measured(bench, lambda: variant.measure(bench, workload))

    return step


def _measured(bench: Bench, measure: Callable[[], None]) -> Found:
    """Return what a measurement found; an error carries what it found before, as ``found``."""
    found = {"speed": bench.speed}
    try:
        with bench.limited_threads():
            measure()
        if bench.speed["red"]:
            wrong = [n for n in bench.speed["numerics"] if not n["ok"]]
            raise Nonconforming("; ".join(f"{n['by']}: {n['error_over_budget']}" for n in wrong))
    except Exception as error:
        error.found = found  # type: ignore[attr-defined]
        raise
    return None, found


def _bench(target: str, peers: Sequence[str] | None = None) -> Bench:
    backend, device = parse_backend(target)
    if peers is None:
        peers = _fused(backend) if device.startswith("cuda") else list(PEERS)
    return Bench(backend, device, "quick", [PEERS[name] for name in peers], threads=2)


def _fused(backend: str) -> list[str]:
    """List the fused kernels that a backend is timed against; others would take its minutes."""
    library = "jax" if backend == "jax" else "torch"
    kernels = ("flash", "efficient", "cudnn", "of causal softmax")
    return [n for n, peer in PEERS.items() if peer.library == library and n.endswith(kernels)]


_STEPS: Mapping[str, Callable[[str, float], Step]] = {
    "machine": _machine,
    "rates": _rates,
    "wrappers": _wrappers,
    "kernels": _judged(calls.KERNELS),
    "paths": _judged(calls.ALL_PATHS),
    "speed": _speed,
    "variants": _variants,
    "profile": tools.profile,
    "sanitizer": tools.sanitizer,
}
