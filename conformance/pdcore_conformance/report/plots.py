"""Layout of the plots: the place of each mark. The template draws the plots as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..record.writing import Growth, Ratio, Record, Run, target
from . import wording

__all__ = ["Axis", "Chart", "PeerPlot", "charts", "comparisons"]

# Figures beyond these are drawn at the edge; the text beside them has the value.
SMALLEST, LARGEST = 1e-9, 1e9

#: Sizes of a chart, in the units of its viewBox; the axes are at the inner edges.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 254, 54, 338, 18, 216

#: The number of colours and markers of curves; further curves reuse them.
STYLES = 6


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high`, laid out over `start` to `stop`."""

    low: float
    high: float
    start: float = 0.0
    stop: float = 100.0

    def at(self, value: float) -> float:
        """Return the place of a value; beyond the axis, or not positive, that of its edge."""
        if math.isnan(value) or value <= self.low:
            return self.start
        if value >= self.high:
            return self.stop
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.stop - self.start), 2)

    def ticks(self, apart: float) -> list[float]:
        """Return round values whose places are at least `apart` from one another."""
        first = math.floor(math.log10(self.low) + 1e-9)
        last = math.ceil(math.log10(self.high) - 1e-9)
        steps: list[tuple[int, Sequence[int]]] = [(1, (1, 2, 5)), (1, (1, 3)), (1, (1,))]
        steps += [(decades, (1,)) for decades in range(2, last - first + 2)]
        for decades, factors in steps:
            begin = -(-first // decades) * decades if decades > 1 else first
            values = [f * 10.0**d for d in range(begin, last + 1, decades) for f in factors]
            inside = [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
            places = [self.at(v) for v in inside]
            if all(abs(b - a) >= apart for a, b in pairwise(places)):
                return inside
        return []


def _usable(values: Iterable[float]) -> list[float]:
    return [v for v in values if math.isfinite(v) and SMALLEST <= v <= LARGEST]


def _around(values: Iterable[float], margin: float) -> tuple[float, float]:
    usable = _usable(values)
    return min(usable) / margin, max(usable) * margin


@dataclass(frozen=True)
class Mark:
    """One comparison: a point with its interval, and its target; places in percent."""

    label: str
    detail: str
    point: float
    low: float | None
    high: float | None
    least: float | None
    most: float | None
    kind: str
    value: str
    interval: str
    target: str
    met: bool | None
    times: str


@dataclass(frozen=True)
class PeerPlot:
    """The ratios of a backend against one peer."""

    peer: str
    marks: tuple[Mark, ...]


def ratio_axis(record: Record) -> Axis:
    """Return the axis of all ratios of a record, so that a reader can compare the plots."""
    values = [0.5, 2.0]
    for run in record["runs"]:
        for entry in run["speed"]["ratios"] if run["speed"] else ():
            ends = (entry["at_least"], entry["at_most"])
            values += [entry["ratio"], *(entry["interval"] or ())]
            values += [end for end in ends if end is not None]
    return Axis(*_around(values, 1.12))


def comparisons(run: Run, axis: Axis) -> list[PeerPlot]:
    """Return the plots of the ratios of a run, peer by peer, in the order of the record."""
    peers: dict[str, list[Mark]] = {}
    for entry in run["speed"]["ratios"] if run["speed"] else ():
        peers.setdefault(entry["peer"], []).append(_mark(entry, axis))
    return [PeerPlot(peer, tuple(marks)) for peer, marks in peers.items()]


def _mark(entry: Ratio, axis: Axis) -> Mark:
    ends, ratio = entry["interval"], entry["ratio"]
    # Without an interval the plot does not say which one is faster.
    kind = "even"
    if ends is not None:
        kind = "faster" if ends[0] > 1 else "slower" if ends[1] < 1 else "even"
    least, most = entry["at_least"], entry["at_most"]
    times = "; ".join(
        f"{wording.cut(name, 60)} {wording.seconds(middle)} "
        f"({wording.seconds(low)} to {wording.seconds(high)})"
        for name, (low, middle, high) in entry["seconds"].items()
    )
    return Mark(
        entry["spec"],
        f"{wording.shape(entry['shape'])} {entry['dtype']}, {entry['direction']}",
        axis.at(ratio),
        None if ends is None else axis.at(ends[0]),
        None if ends is None else axis.at(ends[1]),
        None if least is None else axis.at(least),
        None if most is None else axis.at(most),
        kind,
        f"{wording.number(ratio)}×",
        wording.interval(ends),
        wording.aim(least, most),
        entry["met"],
        f"{times}; {entry['rounds']} rounds",
    )


@dataclass(frozen=True)
class Curve:
    """Time over length: points with their quartiles, in the units of the viewBox."""

    label: str
    style: int
    dashed: bool
    points: tuple[tuple[float, float, float, float], ...]
    path: str
    text: str
    target: str
    met: bool | None


@dataclass(frozen=True)
class Chart:
    """The curves of one run, on axes that all charts of a record share."""

    name: str
    span: str
    curves: tuple[Curve, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    guides: tuple[tuple[str, str, float, float], ...]


def charts(record: Record) -> list[Chart]:
    """Return a chart of the growth of time for every run that measured it."""
    runs = [run for run in record["runs"] if run["speed"] and run["speed"]["growth"]]
    entries = [entry for run in runs if run["speed"] for entry in run["speed"]["growth"]]
    lengths = _usable(float(n) for entry in entries for n in entry["lengths"])
    times = _usable(t for entry in entries for quartiles in entry["seconds"] for t in quartiles)
    if not lengths or not times:
        return []
    x = Axis(*_around(lengths, 1.25), LEFT, RIGHT)
    y = Axis(*_around(times, 1.6), BOTTOM, TOP)
    specs = list(dict.fromkeys(entry["spec"] for entry in entries))
    across = tuple((x.at(n), f"{n:,}") for n in _apart(sorted({int(n) for n in lengths}), x, 44))
    up = tuple((y.at(t), _short(t)) for t in y.ticks(22))
    return [
        _chart(run, {spec: i % STYLES for i, spec in enumerate(specs)}, x, y, across, up)
        for run in runs
    ]


def _chart(
    run: Run,
    styles: Mapping[str, int],
    x: Axis,
    y: Axis,
    across: tuple[tuple[float, str], ...],
    up: tuple[tuple[float, str], ...],
) -> Chart:
    entries = run["speed"]["growth"] if run["speed"] else []
    spans = {(entry["from"], entry["to"]) for entry in entries}
    # A span that all curves share is in the caption, in place of each curve's text.
    [span] = [f"{a:,} to {b:,}" for a, b in spans] if len(spans) == 1 else [""]
    curves = tuple(_curve(entry, styles[entry["spec"]], x, y, not span) for entry in entries)
    return Chart(target(run), span, curves, across, up, tuple(_guides(x, y)))


def _short(value: float) -> str:
    if value >= 100:
        # Beside an axis there is no room for minutes and seconds together.
        return f"{value:,.0f} s"
    return wording.seconds(value).replace(".00", "").replace(".0 ", " ")


def _apart(values: Sequence[int], axis: Axis, apart: float) -> list[int]:
    """Return the values whose labels do not overlap, chosen from the last one down."""
    kept: list[int] = []
    for value in reversed(values):
        if not kept or abs(axis.at(value) - axis.at(kept[-1])) >= apart:
            kept.append(value)
    return kept[::-1]


def _curve(entry: Growth, style: int, x: Axis, y: Axis, with_span: bool) -> Curve:
    points = tuple(
        (x.at(n), y.at(middle), y.at(low), y.at(high))
        for n, (low, middle, high) in zip(entry["lengths"], entry["seconds"], strict=False)
    )
    factor = f"×{wording.number(entry['factor'])}"
    if with_span:
        factor += f" from {entry['from']:,} to {entry['to']:,}"
    return Curve(
        f"{entry['spec']}, {entry['dtype']}, {entry['direction']}",
        style,
        entry["direction"] != "forward",
        points,
        " ".join(f"{px},{py}" for px, py, *_ in points),
        f"{factor} ({wording.interval(entry['interval'])})",
        wording.aim(entry["at_least"], entry["at_most"]),
        entry["met"],
    )


def _guides(x: Axis, y: Axis) -> Iterable[tuple[str, str, float, float]]:
    """Yield the lines that grow like N and like N², from the lower left corner."""
    for power, label in ((1, "N"), (2, "N²")):
        low, high = math.log(x.low), math.log(x.high)
        room = math.log(y.high / y.low)
        end = min(high, low + room / power)
        height = BOTTOM - (BOTTOM - TOP) * power * (end - low) / room
        px = x.at(math.exp(end))
        # The label goes outside of the frame, where no curve runs.
        beside = (px + 4, height + 4) if px == x.stop else (px - 6, TOP - 5)
        yield f"{x.start},{y.start} {px},{height:.2f}", label, *beside
