"""Speed and memory of a backend, each figure beside its target, where there is one.

Nothing is timed before the numbers are right: the backend and every peer are run at the shape that
will be timed, and a sample of the rows, and every gradient, is held against the oracle. A backend
that fails gives no figures; a peer that fails is left out, and named.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pdcore import attention_vjp, bind
from pdcore.plugins import load_backend, registered

from ..frameworks import framework
from ..judge.budget import Verdict, expect, judge
from ..judge.calls import dtype_of
from ..record.environment import environment
from .figures import FIGURES
from .grid import Target, Targets, targets, workloads
from .peers import Peer, Workload, choose_peers, half_pooled
from .timing import interleaved, interval, judged, quartiles, threads_limited

if TYPE_CHECKING:
    from ..record.writing import Speed

__all__ = ["Bench", "draw", "measure", "unmeasured"]

Array = np.ndarray[Any, Any]
SAMPLE = 32
_NOT_MEASURED = re.compile(r"not measured, for [^:]*: (.*)")
MIB = 2.0**20


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
) -> Speed:
    """Measure everything.

    Parameters
    ----------
    backend : str
        Its name.
    device : str, optional
        Where; the first that it declares by default.
    grid : {"quick", "full"}
        Shorter sequences and fewer rounds, or all of it. Targets are stated for the full length,
        and not judged on the quick grid.
    peers : sequence of str, optional
        Names of `pdcore_conformance.bench.peers.PEERS`; all of them by default.
    threads : int
        Of the BLAS, of the NumPy backend, of PyTorch and of onnxruntime.
    say : callable
        Is told what is going on, and the share of the work that is done.
    keep : callable
        Is given what was found so far before each step, with the steps that are still to come in
        ``notes``: what a process that is ended leaves behind.
    deadline : float, optional
        Seconds after which nothing more is begun; what is left out is named in ``notes``.
    earlier : Speed, optional
        What an earlier call with the same arguments has found: only what its ``notes`` name as
        not measured is done, and added to it.

    Returns
    -------
    Speed
        See `pdcore_conformance.record`. Without figures where ``red``.
    """
    bench = Bench(backend, device, grid, choose_peers(list(peers or [])), threads)
    began = time.perf_counter()
    with bench.limited():
        steps = bench.steps()
        if earlier is not None:
            rest = unmeasured(earlier)
            steps = [step for step in steps if step[0] in rest]
            bench.go_on(earlier)
        for index, (title, step) in enumerate(steps):
            say(title, index / len(steps))
            late = deadline is not None and time.perf_counter() - began > deadline
            if late or bench.speed["red"]:
                why = "no time was left" if late else "the numerics are red"
                bench.speed["notes"].append(_left_out(why, title))
            else:
                keep(bench.so_far([name for name, _ in steps[index:]], began))
                step()
    say("done", 1.0)
    return bench.so_far([], began)


#: How the names of peers begin that are a framework's kernels, or such a kernel for softmax.
FUSED = ("torch SDPA of softmax", "jax.nn.dot_product_attention")


class Bench:
    """The measurements of one backend on one device.

    Attributes
    ----------
    speed : Speed
        What was found so far.
    """

    def __init__(
        self, backend: str, device: str | None, grid: str, peers: list[Peer], threads: int
    ) -> None:
        info = registered()[backend]
        self.backend, self.device = backend, device or info.devices[0]
        self.runner = load_backend(backend)
        self.differentiates = info.support("autodiff") == "full"
        self.pulls_back = self.differentiates or info.support("vjp") == "full"
        self.framework = framework(info.library)
        self.grid, self.peers, self.threads = grid, peers, threads
        self.targets: Targets | None = targets(backend, self.device)
        self.speed: Any = {
            "grid": "full" if grid == "full" else "quick",
            "threads": threads,
            "notes": [],
            "seconds": 0.0,
            "load": environment()["load"],
            "numerics": [],
            "red": False,
            "ratios": [],
            "growth": [],
            "memory": [],
            "figures": [],
            "missing_peers": [],
        }
        self._green: set[tuple[str, Workload]] = set()
        self._missing()

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """List what is to be measured, in order."""
        found: list[tuple[str, Callable[[], None]]] = []
        for workload in workloads(self.backend, self.device, self.grid):
            if self.runs(workload):
                found.append((str(workload), lambda w=workload: self.against_peers(w)))  # type: ignore[misc]
        found += [
            ("bn and sh against softmax", self.against_softmax),
            *((title, lambda f=figure: f(self)) for title, figure in FIGURES.items()),
        ]
        return found

    def so_far(self, rest: Sequence[str], began: float) -> Speed:
        """Give what was found since `began`, and name the rest."""
        found: Speed = copy.deepcopy(self.speed)
        found["notes"] += [_left_out("the process was ended", title) for title in rest]
        found["seconds"] += time.perf_counter() - began
        return found

    def go_on(self, earlier: Speed) -> None:
        """Begin with what an earlier run has found."""
        self.speed = copy.deepcopy(earlier)
        self.speed["notes"] = [note for note in earlier["notes"] if not _NOT_MEASURED.match(note)]

    @contextmanager
    def limited(self) -> Any:
        """Set the threads of everything that has some."""
        with threads_limited(self.threads) as known:
            if not known:
                self.speed["notes"].append(
                    "threadpoolctl is not installed: the threads of the BLAS are not limited"
                )
            if self.speed["load"] is not None and self.speed["load"] > 0.5:
                self.speed["notes"].append(
                    f"the machine was busy (load {self.speed['load']:.2f}): figures may be off"
                )
            yield

    # --- calls ------------------------------------------------------------------------------------

    def call(self, workload: Workload, x: Mapping[str, Any], d: Any) -> Callable[[], Any]:
        """Give a call of the backend that ends when its results are there."""
        layer = bind(workload.spec, backend=self.backend)
        framework = self.framework
        if workload.direction == "forward" or self.differentiates:
            function = self._step(framework, lambda a: layer(a["q"], a["k"], a["v"]), workload)
            return lambda: framework.finish(function(x, d))

        def both() -> Any:
            out, _, vjp = attention_vjp(x["q"], x["k"], x["v"], workload.spec, backend=self.backend)
            return framework.finish((out, vjp(d)))

        return both

    def peer_call(self, peer: Peer, workload: Workload, x: Any, d: Any) -> Callable[[], Any]:
        """Give such a call of a peer."""
        library = framework(peer.library)
        function = self._step(library, peer.make(workload), workload)
        return lambda: library.finish(function(x, d))

    def _step(self, library: Any, function: Any, workload: Workload) -> Callable[[Any, Any], Any]:
        if workload.direction == "forward":
            forward = library.prepared(function)
            return lambda x, d: forward(x)
        step: Callable[[Any, Any], Any] = library.step(function)
        return step

    def arrays(self, workload: Workload, library: Any) -> tuple[dict[str, Any], Any]:
        """Draw q, k, v and a cotangent, and take them to a library."""
        drawn = draw(workload)
        taken = {name: library.asarray(x, self.device) for name, x in drawn.items()}
        return {name: taken[name] for name in "qkv"}, taken["d"]

    def runs(self, workload: Workload) -> bool:
        """Whether the backend declares what a workload needs."""
        info = registered()[self.backend]
        back = workload.direction == "forward" or self.pulls_back
        return info.support(workload.dtype) == "full" and back

    # --- numerics ---------------------------------------------------------------------------------

    def green(self, by: str, workload: Workload, make: Callable[..., Any], library: Any) -> bool:
        """Hold one call against the oracle, and note how it did; once for each workload."""
        if (by, workload) in self._green:
            return True
        drawn = draw(workload)
        length, spec, call = workload.shape[2], workload.spec, dict[str, Any]()
        rows = np.unique(np.linspace(0, length - 1, SAMPLE).astype(int))
        if "causal" in spec:  # neighbours, so that an offset says where they stand
            rows = np.arange(length // 2, min(length, length // 2 + SAMPLE))
            call["offset"] = int(rows[0])
        # Gradients are linear in the cotangent: with one of zeros elsewhere, the sampled rows are
        # all that they depend on.
        d = np.zeros_like(drawn["d"])
        d[..., rows, :] = drawn["d"][..., rows, :]
        x = {name: library.asarray(drawn[name], self.device) for name in "qkv"}
        result = make(x, library.asarray(d, self.device))()
        out, gradients = (result, {}) if workload.direction == "forward" else result
        got = {"out": library.asnumpy(out)[..., rows, :]}
        for name, gradient in gradients.items():
            found = library.asnumpy(gradient)
            got[f"d_{name}"] = found[..., rows, :] if name == "q" else found
        asked: dict[str, Any] = {"d_out": d[..., rows, :]} if gradients else {}
        expected = expect(drawn["q"][..., rows, :], drawn["k"], drawn["v"], spec, **call, **asked)
        verdicts = judge(got, expected)
        self._note(by, workload, verdicts)
        good = all(verdict.ok for verdict in verdicts.values())
        if good:
            self._green.add((by, workload))
        return good

    def _note(self, by: str, workload: Workload, verdicts: Mapping[str, Verdict]) -> None:
        self.speed["numerics"].append(
            {
                "spec": workload.spec,
                "shape": list(workload.shape),
                "dtype": workload.dtype,
                "by": by,
                "error_over_budget": {name: verdict.ratio for name, verdict in verdicts.items()},
                "ok": all(verdict.ok for verdict in verdicts.values()),
            }
        )

    def own(self, workload: Workload) -> bool:
        """Check the backend itself: red, and nothing more is measured."""
        good = self.green(
            self.backend, workload, lambda x, d: self.call(workload, x, d), self.framework
        )
        self.speed["red"] = self.speed["red"] or not good
        return good

    def _missing(self) -> None:
        for peer in self.peers:
            reason = peer.missing(self.device)
            if reason is not None:
                self.speed["missing_peers"].append({"peer": peer.name, "reason": reason})

    # --- measurements -----------------------------------------------------------------------------

    def against_peers(self, workload: Workload) -> None:
        """Time one workload against every peer that computes it."""
        with self.framework.precision(workload.dtype):
            if not self.own(workload):
                return
            own = self.call(workload, *self.arrays(workload, self.framework))
            groups: dict[str, dict[str, Callable[[], Any]]] = {}
            absent = {entry["peer"] for entry in self.speed["missing_peers"]}
            for peer in self.peers:
                if peer.takes(workload) and peer.name not in absent:
                    call = self._peer(peer, workload)
                    if call is not None:
                        groups.setdefault(peer.library, {})[peer.name] = call
            # The threads of one library go on spinning when it is through, and would be in the
            # way of another's next call: each library has a turn of its own with the backend.
            for calls in groups.values():
                calls = {self.backend: own, **calls}
                once = {name: min(t) for name, t in interleaved(calls, 1).items()}
                rounds = self._rounds(sum(once.values()))
                self._ratios(workload, interleaved(calls, rounds, warm_up=0))

    def _peer(self, peer: Peer, workload: Workload) -> Callable[[], Any] | None:
        """Prepare a peer, or say what keeps it from being compared with."""
        workload = peer.own(workload)
        library = framework(peer.library)
        try:
            with library.precision(workload.dtype):
                good = self.green(
                    peer.name,
                    workload,
                    lambda x, d: self.peer_call(peer, workload, x, d),
                    library,
                )
        except Exception as error:  # noqa: BLE001 - a peer may refuse in its own way
            text = " ".join(str(error).split())[:200]
            reason = f"{workload}: {type(error).__name__}: {text}"
            self.speed["missing_peers"].append({"peer": peer.name, "reason": reason})
            return None
        if not good:
            reason = f"{workload}: its own result is over the budget, so it is not compared with"
            self.speed["missing_peers"].append({"peer": peer.name, "reason": reason})
            return None
        return self.peer_call(peer, workload, *self.arrays(workload, library))

    def _ratios(self, workload: Workload, times: Mapping[str, list[float]]) -> None:
        peers = [name for name in times if name != self.backend]
        promised = None
        if self.targets is not None and workload.direction == "forward":
            promised = self.targets.ratios.get((workload.spec, workload.shape))
        home = [n for n in peers if n.endswith("NumPy") and not n.startswith("literal")]
        fastest = min(home, key=lambda n: statistics.median(times[n]), default=None)
        kernels = [n for n in peers if n.startswith(FUSED)]
        quickest = min(kernels, key=lambda n: statistics.median(times[n]), default=None)
        for name in peers:
            least = promised if name == fastest else None
            if self.targets is not None and name == quickest:
                least = self.targets.fastest.get(workload, least)
            if self.targets is not None and self.grid == "full":
                key = (workload.spec, workload.shape, workload.direction, name)
                least = self.targets.against.get(key, least)
            self.ratio(workload, name, times[name], times[self.backend], (least, None))

    def ratio(
        self, workload: Workload, peer: str, theirs: list[float], ours: list[float], target: Target
    ) -> None:
        """Note the median of the ratios of times measured next to one another."""
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        value = statistics.median(ratios)
        self.speed["ratios"].append(
            {
                "spec": workload.spec,
                "shape": list(workload.shape),
                "dtype": workload.dtype,
                "direction": workload.direction,
                "peer": peer,
                "ratio": value,
                "interval": interval(ratios),
                "rounds": len(ratios),
                "seconds": {"backend": quartiles(ours), "peer": quartiles(theirs)},
                **judged(value, target),
            }
        )

    def against_softmax(self) -> None:
        """Time Attention-BN and Attention-SH against softmax."""
        shape = workloads(self.backend, self.device, self.grid)[0].shape
        half, dtype = (
            half_pooled(shape[1]),
            workloads(self.backend, self.device, self.grid)[0].dtype,
        )
        tried = {spec: Workload(spec, shape, dtype) for spec in ("softmax", "bn", half)}
        with self.framework.precision(dtype):
            if not all(self.own(workload) for workload in tried.values()):
                return
            calls = {
                spec: self.call(workload, *self.arrays(workload, self.framework))
                for spec, workload in tried.items()
            }
            once = sum(min(t) for t in interleaved(calls, 1).values())
            times = interleaved(calls, self._rounds(once), warm_up=0)
        promised = self.targets.specs if self.targets and self.grid == "full" else {}
        for spec in ("bn", half):
            self.ratio(
                tried[spec],
                "spec softmax",
                times["softmax"],
                times[spec],
                (promised.get(spec), None),
            )

    def figure(self, name: str, values: list[float], unit: str, target: Target) -> None:
        """Note the median of some values beside its target."""
        value = statistics.median(values)
        self.speed["figures"].append(
            {
                "name": name,
                "value": value,
                "unit": unit,
                "interval": interval(values),
                **judged(value, target),
            }
        )

    def _rounds(self, seconds: float) -> int:
        """Spend a few seconds on a comparison, in 5 rounds at the least."""
        budget, least, most = (6.0, 5, 15) if self.grid == "quick" else (25.0, 7, 31)
        return int(min(most, max(least, budget / seconds)))


def unmeasured(speed: Speed) -> list[str]:
    """List the steps that were left out, by their titles."""
    found = (_NOT_MEASURED.match(note) for note in speed["notes"])
    return [match[1] for match in found if match]


def _left_out(why: str, title: str) -> str:
    return f"not measured, for {why}: {title}"


def draw(workload: Workload) -> dict[str, Array]:
    """Draw q, k, v and d, the cotangent, in NumPy."""
    rng = np.random.default_rng(0)
    dtype = dtype_of(workload.dtype)
    return {
        name: rng.standard_normal(workload.shape, dtype=np.float32).astype(dtype) for name in "qkvd"
    }
