"""The measurements of one backend on one device, each next to its target where there is one.

Nothing is timed before the numbers are right: the backend and every peer run at the shape that will
be timed, and a sample of the rows of the result, and every gradient, are compared with the oracle.
A backend that fails has no figures; a peer that fails is left out, and listed with the reason.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pdcore import attention_vjp, bind
from pdcore.plugins import load_backend, registered

from ..frameworks import framework
from ..judge.budget import Verdict, judge
from ..record.environment import environment
from .grid import Target, Targets, targets
from .peers import Peer
from .sample import draw, required, sampled
from .timing import Clock, interleaved, interval, judged, quartiles, threads_limited
from .workload import Workload, operations

if TYPE_CHECKING:
    from ..record.writing import Speed

__all__ = ["FUSED", "Bench", "left_out", "unmeasured"]

#: The seconds of a GPU that one measurement takes, in up to 20 calls.
BACK_TO_BACK = 0.03
#: The rounds of a comparison on a GPU.
ON_GPU = 7
#: The most rounds of a comparison of a table on the CPU, and the seconds after which it ends.
MOST, SECONDS = 101, 4.0
#: The calls that the host issues in a row where its time is measured.
ISSUED = 10
_NOT_MEASURED = re.compile(r"not measured, for [^:]*: (.*)")
#: Prefixes of the names of peers that run a framework's fused kernel for softmax.
FUSED = ("torch SDPA of softmax", "jax.nn.dot_product_attention")


class Bench:
    """The measurements of one backend on one device.

    Attributes
    ----------
    speed : Speed
        The measurements so far.
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
            "grid": "quick" if grid == "quick" else "full",
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
        self._list_missing_peers()

    def so_far(self, rest: Sequence[str], started: float) -> Speed:
        """Return a copy of the measurements, which lists the steps in `rest` as not measured."""
        speed: Speed = copy.deepcopy(self.speed)
        speed["notes"] += [left_out("the process was ended", title) for title in rest]
        speed["seconds"] += time.perf_counter() - started
        return speed

    def resume(self, earlier: Speed) -> None:
        """Start from the measurements of an earlier run."""
        self.speed = copy.deepcopy(earlier)
        self.speed["notes"] = [note for note in earlier["notes"] if not _NOT_MEASURED.match(note)]

    @contextmanager
    def limited_threads(self) -> Iterator[None]:
        """Limit the threads of the BLAS and of the NumPy backend in a block."""
        with threads_limited(self.threads) as blas_limited:
            if not blas_limited:
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
        """Return a call of the backend that ends when its results are computed."""
        issue = self.issue(workload, x, d)
        return lambda: self.framework.finish(issue())

    def issue(self, workload: Workload, x: Mapping[str, Any], d: Any) -> Callable[[], Any]:
        """Return a call of the backend that may end before a device has computed its results."""
        layer, named = bind(workload.spec, backend=self.backend), dict[str, Any]()
        if workload.segments:
            named["segments"] = self.framework.asarray(workload.segment_ids(), self.device)
        if params := required(workload):
            named["params"] = {n: self.framework.asarray(p, self.device) for n, p in params.items()}

        def attend(a: Mapping[str, Any]) -> Any:
            return layer(a["q"], a["k"], a["v"], **named)

        if workload.direction == "forward" or self.differentiates:
            function = self._step(self.framework, attend, workload)
            return lambda: function(x, d)

        def both() -> Any:
            out, _, vjp = attention_vjp(
                x["q"], x["k"], x["v"], workload.spec, backend=self.backend, **named
            )
            return out, vjp(d)

        return both

    def peer_call(self, peer: Peer, workload: Workload, x: Any, d: Any) -> Callable[[], Any]:
        """Return a call of a peer that ends when its results are computed."""
        issue, library = self.peer_issue(peer, workload, x, d), framework(peer.library)
        return lambda: library.finish(issue())

    def peer_issue(self, peer: Peer, workload: Workload, x: Any, d: Any) -> Callable[[], Any]:
        """Return a call of a peer that may end before a device has computed its results."""
        function = self._step(framework(peer.library), peer.make(workload), workload)
        return lambda: function(x, d)

    def _step(self, library: Any, function: Any, workload: Workload) -> Callable[[Any, Any], Any]:
        if workload.direction == "forward":
            forward = library.prepared(function)
            return lambda x, d: forward(x)
        step: Callable[[Any, Any], Any] = library.step(function)
        return step

    def arrays(self, workload: Workload, library: Any) -> tuple[dict[str, Any], Any]:
        """Draw q, k, v and a cotangent as arrays of a library on the device."""
        drawn = draw(workload)
        arrays = {name: library.asarray(x, self.device) for name, x in drawn.items()}
        return {name: arrays[name] for name in "qkv"}, arrays["d"]

    def runs(self, workload: Workload) -> bool:
        """Return whether the backend declares what a workload needs."""
        info = registered()[self.backend]
        differentiable = workload.direction == "forward" or self.pulls_back
        return info.support(workload.dtype) == "full" and differentiable

    # --- numerics ---------------------------------------------------------------------------------

    def green(self, by: str, workload: Workload, make: Callable[..., Any], library: Any) -> bool:
        """Compare a call with the oracle and record the errors; return whether all are in budget.

        A workload that was right before is not compared again.
        """
        if (by, workload) in self._green:
            return True
        sample = sampled(workload)
        x = {name: library.asarray(draw(workload)[name], self.device) for name in "qkv"}
        result = make(x, library.asarray(sample.cotangent, self.device))()
        out, gradients = (result, {}) if workload.direction == "forward" else result
        results = {"out": sample.of(library.asnumpy(out), rows=True)}
        for name in gradients.keys() & set("qkv"):  # parameters have their defaults
            gradient = library.asnumpy(gradients[name])
            results[f"d_{name}"] = sample.of(gradient, rows=name == "q")
        verdicts = judge(results, sample.expected)
        self._note(by, workload, verdicts)
        good = all(verdict.ok for verdict in verdicts.values())
        if good:
            self._green.add((by, workload))
        return good

    def _note(self, by: str, workload: Workload, verdicts: Mapping[str, Verdict]) -> None:
        self.speed["numerics"].append(
            {
                "spec": workload.name,
                "shape": list(workload.shape),
                "dtype": workload.dtype,
                "by": by,
                "error_over_budget": {name: verdict.ratio for name, verdict in verdicts.items()},
                "ok": all(verdict.ok for verdict in verdicts.values()),
            }
        )

    def check_backend(self, workload: Workload) -> bool:
        """Compare the backend with the oracle; set ``red``, which ends the bench, if it fails."""
        good = self.green(
            self.backend, workload, lambda x, d: self.call(workload, x, d), self.framework
        )
        self.speed["red"] = self.speed["red"] or not good
        return good

    def _list_missing_peers(self) -> None:
        for peer in self.peers:
            reason = peer.missing(self.device)
            if reason is not None:
                self.speed["missing_peers"].append({"peer": peer.name, "reason": reason})

    # --- measurements -----------------------------------------------------------------------------

    def against_peers(self, workload: Workload) -> None:
        """Time one workload against every peer that computes it."""
        with self.framework.precision(workload.dtype):
            if not self.check_backend(workload):
                return
            backend_call = self.issue(workload, *self.arrays(workload, self.framework))
            groups: dict[str, dict[str, Callable[[], Any]]] = {}
            absent = {entry["peer"] for entry in self.speed["missing_peers"]}
            for peer in self.peers:
                if peer.takes(workload) and peer.name not in absent:
                    call = self.checked_peer_call(peer, workload)
                    if call is not None:
                        groups.setdefault(peer.library, {})[peer.name] = call
            # The threads of a library keep spinning after a call and would slow the next call of
            # another library: the peers of each library are timed apart, each with the backend.
            for library, calls in groups.items():
                self.against(workload, {self.backend: backend_call, **calls}, framework(library))
            if self.on_gpu:
                if not groups:
                    self.against(workload, {self.backend: backend_call})
                self._issued(workload, backend_call)

    def against(
        self, workload: Workload, calls: Mapping[str, Callable[[], Any]], library: Any = None
    ) -> None:
        """Time a call of the backend in turn with others, of one library; record the ratios."""
        times = self.timed(calls, library)
        self._ratios(workload, times)
        if self.on_gpu:
            self._rates(workload, times)

    def timed(
        self, calls: Mapping[str, Callable[[], Any]], library: Any = None
    ) -> dict[str, list[float]]:
        """Time a call of the backend in turn with others, of one library."""
        clocks = dict.fromkeys(calls, self._clock(library or self.framework))
        clocks[self.backend] = self._clock(self.framework)
        if self.grid == "table" and not self.on_gpu:
            return interleaved(calls, MOST, clocks=clocks, seconds=SECONDS)
        once = {name: min(t) for name, t in interleaved(calls, 1, clocks=clocks).items()}
        repeat = {name: self._repeat(seconds) for name, seconds in once.items()}
        rounds = self._rounds(sum(repeat[name] * seconds for name, seconds in once.items()))
        return interleaved(calls, rounds, warm_up=0, repeat=repeat, clocks=clocks)

    @property
    def on_gpu(self) -> bool:
        """Whether the calls run on a GPU."""
        return self.device.partition(":")[0] == "cuda"

    def _clock(self, library: Any) -> Clock:
        """Return how the calls of a library are timed: by events on a GPU."""
        return lambda call, repeat: library.seconds(call, repeat, self.device)

    def _repeat(self, once: float) -> int:
        """Return how many calls are timed at once, so that a GPU is not waited for each time."""
        return max(1, min(20, int(BACK_TO_BACK / once))) if self.on_gpu else 1

    def _rates(self, workload: Workload, times: Mapping[str, list[float]]) -> None:
        """Record the operations per second of the backend and of the peers."""
        for name, seconds in times.items():
            done = operations(self._computed(name, workload))
            self.figure(
                f"{workload}, {name}", [done / t / 1e12 for t in seconds], "TFLOP/s", (None, None)
            )

    def _computed(self, by: str, workload: Workload) -> Workload:
        """Return the workload that a peer computes in place of another."""
        return next((p.computed(workload) for p in self.peers if p.name == by), workload)

    def _issued(self, workload: Workload, call: Callable[[], Any]) -> None:
        """Record the time of the host until it has issued a call."""
        seconds = [self.framework.host_seconds(call, ISSUED) for _ in range(3)]
        name = f"{workload}: time of the host"
        self.figure(name, [1e6 * s for s in seconds], "us", (None, None))

    def checked_peer_call(self, peer: Peer, workload: Workload) -> Callable[[], Any] | None:
        """Return a call of a peer; None, and a reason in ``missing_peers``, where it fails."""
        workload = peer.computed(workload)
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
        return self.peer_issue(peer, workload, *self.arrays(workload, library))

    def _ratios(self, workload: Workload, times: Mapping[str, list[float]]) -> None:
        peers = [name for name in times if name != self.backend]
        least_of_home = None
        if self.targets is not None and workload.direction == "forward":
            least_of_home = self.targets.ratios.get((workload.spec, workload.shape))
        home = [n for n in peers if n.endswith("NumPy") and not n.startswith("literal")]
        fastest_home = min(home, key=lambda n: statistics.median(times[n]), default=None)
        kernels = [n for n in peers if n.startswith(FUSED)]
        fastest_kernel = min(kernels, key=lambda n: statistics.median(times[n]), default=None)
        for name in peers:
            least = least_of_home if name == fastest_home else None
            if self.targets is not None and name == fastest_kernel:
                least = self.targets.fastest.get(workload, least)
            if self.targets is not None and self.grid == "full":
                key = (workload.spec, workload.shape, workload.direction, name)
                least = self.targets.against.get(key, least)
            self.ratio(workload, name, times[name], times[self.backend], (least, None))

    def ratio(
        self, workload: Workload, peer: str, theirs: list[float], ours: list[float], target: Target
    ) -> None:
        """Record the median ratio of pairs of times that were measured one after the other."""
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        value = statistics.median(ratios)
        self.speed["ratios"].append(
            {
                "spec": workload.name,
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

    def figure(self, name: str, values: list[float], unit: str, target: Target) -> None:
        """Record the median of some values, and its target."""
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
        """Return how many rounds of so many seconds fit in the time of a comparison."""
        if self.on_gpu:
            return ON_GPU
        budget, least, most = (6.0, 5, 15) if self.grid == "quick" else (25.0, 7, 31)
        return int(min(most, max(least, budget / seconds)))


def unmeasured(speed: Speed) -> list[str]:
    """Return the titles of the steps that were left out."""
    matches = (_NOT_MEASURED.match(note) for note in speed["notes"])
    return [match[1] for match in matches if match]


def left_out(why: str, title: str) -> str:
    """Return the note for a step that is left out, which `unmeasured` reads."""
    return f"not measured, for {why}: {title}"
