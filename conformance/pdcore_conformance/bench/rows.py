"""The table of a backend's times over those of the usual attention, with the goals of its rows.

The usual attention is that of the backend's library, such as PyTorch's
`scaled_dot_product_attention`, or the backend's own softmax where the library has none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pdcore.errors import SpecError, nearest
from pdcore.plugins import registered
from pdcore.spec import parse

from ..frameworks import framework
from .measurements import Bench
from .peers import PEERS
from .workload import DIRECTIONS, Shape, Workload

__all__ = ["SHAPES", "Row", "Rows", "choose", "goal", "peers_of", "rows", "steps"]

#: The shapes of q, k and v, the columns of the table.
SHAPES: tuple[Shape, ...] = (1, 8, 4096, 64), (1, 8, 1024, 64), (8, 8, 512, 64), (32, 8, 128, 64)
#: How many times the goal of the result alone the goal with gradients is.
WITH_GRADIENTS = 1.15
#: The peer that computes the usual attention of a library.
USUAL: Mapping[str, str] = {
    "torch": "torch SDPA",
    "jax": "jax.nn.dot_product_attention",
    "cupy": "matmul and softmax, CuPy",
}
#: Plain NumPy, of which the fastest is taken.
PLAIN = tuple(name for name in PEERS if name.endswith("NumPy") and not name.startswith("literal"))
ONNX = "onnxruntime Attention"


class Row(NamedTuple):
    """A row of the table: a call, and the call by whose time its time is divided.

    Attributes
    ----------
    spec : str
    over : str
        The spec of the other call.
    by : tuple of str
        The `PEERS` that compute the other call; the backend itself without any.
    segments : int
        The number of equal segments, whose batch is the other call; 0 for none.
    """

    spec: str
    over: str
    by: tuple[str, ...] = ()
    segments: int = 0

    @property
    def name(self) -> str:
        """The spec, with the number of segments where there are any."""
        return self.workload(SHAPES[0], DIRECTIONS[0]).name

    def workload(self, shape: Shape, direction: str) -> Workload:
        """Return the call of a row with a shape and a direction."""
        return Workload(self.spec, shape, direction=direction, segments=self.segments)


#: Rows, each with one shape and one direction.
Rows = list[tuple[Row, Workload]]

_PREFIX, _SINK = "causal+bn(statistics=prefix)", "h(sum,sink=param)"
_SPECS = (
    "bn",
    "bn(with_std=false)",
    "bn+sh(half=2)",
    "linear",
    _PREFIX,
    "sparse(64,64)",
    "mixture(2)",
    "gaussian(0.1)",
    "cosine",
    "random_features(64)",
    "causal+alibi",
)
_SEGMENTS = (4, 8)

#: The most times the other's time, for each of `SHAPES`.
_Goals = tuple[float | None, ...]


def _least(*speeds: float) -> _Goals:
    """Return the goals of times from the least speeds."""
    return tuple(1 / speed for speed in speeds)


#: The goals of the result alone, by backend and device, and by the name of the row and its peers.
_FORWARD: Mapping[str, Mapping[tuple[str, tuple[str, ...]], _Goals]] = {
    "torch:cpu": {
        **{
            (spec, (USUAL["torch"],)): goals
            for spec, goals in {
                "softmax": (1.03,) * 4,
                "bn": (1.02, 1.05, 1.10, 1.20),
                "bn(with_std=false)": (1.03,) * 4,
                "bn+sh(half=2)": (0.77, 0.83, 0.9, 1.1),
                "linear": (0.08, 0.18, 0.35, 1.0),
                _PREFIX: (1.15, 1.2, 1.25, 1.3),
                "sparse(64,64)": (0.15, 0.4, 0.6, 1.2),
                "mixture(2)": (1.3, 1.5, 2.0, 3.0),
                "gaussian(0.1)": (1.05, 1.1, 1.2, 1.4),
                "cosine": (1.05, 1.1, 1.2, 1.4),
                "random_features(64)": (0.15, 0.25, 0.8, 2.0),
                "causal+alibi": (1.3,) * 4,
            }.items()
        },
        (_SINK, ()): (1.05,) * 4,
        # Shorter segments than four blocks of a kernel, 256 tokens on the CPU, have no goal.
        ("softmax segments=4", ()): (1.2, 1.2, None, None),
        ("softmax segments=8", ()): (1.2, None, None, None),
    },
    "jax:cpu": {
        ("softmax", (USUAL["jax"],)): _least(3.5, 4, 3, 2.2),
        (_PREFIX, (USUAL["jax"],)): (1.0,) * 4,
    },
    "numpy:cpu": {
        ("softmax", (ONNX,)): _least(0.9, 0.9, 0.9, 0.9),
        ("softmax", PLAIN): _least(1.5, 1.5, 1.5, 1.5),
        (_PREFIX, ()): (1.5,) * 4,
    },
}
#: Those with gradients that are not `WITH_GRADIENTS` times those of the result alone.
_BACKWARD: Mapping[str, Mapping[tuple[str, tuple[str, ...]], _Goals]] = {
    "jax:cpu": {
        ("softmax", (USUAL["jax"],)): _least(2, 2.2, 2.2, 1.1),
        (_PREFIX, (USUAL["jax"],)): (1.0,) * 4,
    },
}


def rows(backend: str) -> list[Row]:
    """Return the rows of a backend's table."""
    library = registered()[backend].library
    usual = (USUAL[library],) if library in USUAL else ()
    peers = [(ONNX,), PLAIN] if library == "numpy" else [usual]
    listed = [Row("softmax", "softmax", by) for by in peers if by]
    for spec in _SPECS:
        over = "causal" if "causal" in spec and usual else "softmax"
        listed.append(Row(spec, over, usual))
    listed.append(Row(_SINK, "softmax"))
    return listed + [Row("softmax", "softmax", segments=count) for count in _SEGMENTS]


def peers_of(listed: list[Row]) -> list[str]:
    """Return the names of the peers that some rows are divided by."""
    return list(dict.fromkeys(name for row in listed for name in row.by))


def choose(
    backend: str,
    spec: str | None = None,
    shape: Shape | None = None,
    direction: str | None = None,
) -> Rows:
    """Return the rows with a spec, of one shape or of all, in one direction or in both.

    Raises
    ------
    ValueError
        For a spec without a row, with the nearest one.
    """
    listed = rows(backend)
    if spec is not None:
        wanted = _canonical(spec)
        found = [row for row in listed if _canonical(row.name) == wanted]
        if not found:
            names = dict.fromkeys(row.name for row in listed)
            raise ValueError(
                f"the table of {backend} has no row {spec!r}, as no other call is known by whose "
                f"time to divide; {nearest(spec, names)}"
            )
        listed = found
    return [
        (row, row.workload(columns, way))
        for row in listed
        for columns in ([shape] if shape else SHAPES)
        for way in ([direction] if direction else DIRECTIONS)
    ]


def _canonical(name: str) -> str:
    """Return the name of a row with its spec in canonical form, if it is a spec."""
    spec, *rest = name.split(" ", 1)
    try:
        return " ".join([str(parse(spec)), *rest])
    except SpecError:
        return name


def goal(backend: str, device: str, row: Row, workload: Workload) -> float | None:
    """Return the most times the other's time that meets the goal of a row, None for no goal."""
    target, key = f"{backend}:{device.partition(':')[0]}", (row.name, row.by)
    if workload.shape not in SHAPES:
        return None
    column, forward = SHAPES.index(workload.shape), _FORWARD.get(target, {}).get(key)
    if forward is None or forward[column] is None:
        return None
    if workload.direction == DIRECTIONS[0]:
        return forward[column]
    special = _BACKWARD.get(target, {}).get(key)
    return special[column] if special else WITH_GRADIENTS * (forward[column] or 0.0)


def steps(bench: Bench, chosen: Rows) -> list[tuple[str, Callable[[], None]]]:
    """List the steps that measure some rows, by title; rows that cannot run are left out."""
    return [
        (_title(row, workload), lambda row=row, workload=workload: _measure(bench, row, workload))  # type: ignore[misc]
        for row, workload in chosen
        if bench.runs(workload) and (workload.direction == DIRECTIONS[0] or _derives(row))
    ]


def _title(row: Row, workload: Workload) -> str:
    return f"{workload} over {row.by[0] if row.by else 'softmax'}"


def _derives(row: Row) -> bool:
    """Check whether the other call of a row has gradients."""
    return not row.by or any(PEERS[name].backward for name in row.by)


def _measure(bench: Bench, row: Row, workload: Workload) -> None:
    """Time a row in turn with the calls by whose time it is divided; record the fastest."""
    with bench.framework.precision(workload.dtype):
        if not bench.check_backend(workload):
            return
        calls = _others(bench, row, workload)
        if not calls:
            return
        library = framework(PEERS[row.by[0]].library) if row.by else None
        ours = bench.issue(workload, *bench.arrays(workload, bench.framework))
        times = bench.timed({bench.backend: ours, **calls}, library)
    fastest = min(calls, key=lambda name: statistics.median(times[name]))
    most = goal(bench.backend, bench.device, row, workload)
    target = (None if most is None else 1 / most, None)
    bench.ratio(workload, fastest, times[fastest], times[bench.backend], target)


def _others(bench: Bench, row: Row, workload: Workload) -> dict[str, Callable[[], Any]]:
    """Return the calls by whose time a row is divided, whose numbers are right, by name."""
    other = (workload.apart() if row.segments else workload)._replace(spec=row.over)
    if not row.by:
        if not bench.check_backend(other):
            return {}
        name = "a batch of the segments" if row.segments else f"spec {row.over}"
        return {name: bench.issue(other, *bench.arrays(other, bench.framework))}
    missing = {entry["peer"] for entry in bench.speed["missing_peers"]}
    peers = [PEERS[name] for name in row.by if name not in missing]
    calls = {peer.name: bench.checked_peer_call(peer, other) for peer in peers if peer.takes(other)}
    return {name: call for name, call in calls.items() if call is not None}
