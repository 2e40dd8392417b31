"""The text of figures, and of strings from a record, in the page and on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pdcore.errors import cut, visible

__all__ = [
    "aim",
    "cut",
    "interval",
    "number",
    "over_budget",
    "seconds",
    "shape",
    "span",
    "visible",
]


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, and without an exponent where it is short.

    Examples
    --------
    >>> [number(x) for x in (0.0, 0.04231, 2.0, 1234.5, 2.5e-7, float("inf"), None)]
    ['0', '0.0423', '2.00', '1,234', '2.5e-07', '∞', '']
    """
    if value is None:
        return ""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-4 <= size < 1e7:
        return f"{value:.{digits - 1}g}"
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{places}f}"


def over_budget(ratio: float | None) -> str:
    """Return an error over its budget, with two significant digits.

    Examples
    --------
    >>> [over_budget(x) for x in (0.0, 0.00004, 0.123, 1.004, 1.04, 250.0)]
    ['0', '<0.001', '0.12', '1.004', '1.040', '250']
    """
    if ratio is None:
        return ""
    if 0 < ratio < 0.001:
        return "<0.001"
    if 1 < ratio < 1.05:
        # A failure must not read "1.0", which passes.
        return f"{ratio:.3f}" if ratio >= 1.0005 else "1.001"
    if 10 <= ratio < 1e7:
        return f"{ratio:,.0f}"
    return number(ratio, 2)


def seconds(value: float | None) -> str:
    """Return a time in the unit that suits it.

    Examples
    --------
    >>> [seconds(x) for x in (3e-6, 0.0421, 1.5, 93.1, 600.0)]
    ['3.00 µs', '42.1 ms', '1.50 s', '93.1 s', '10 min 0 s']
    """
    if value is None:
        return ""
    if not math.isfinite(value) or value <= 0:
        return f"{number(value)} s"
    if value >= 120:
        whole = round(value)
        return f"{whole // 60:,} min {whole % 60} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value * 1e9)} ns"


def shape(sizes: Sequence[int]) -> str:
    """Return a shape as the text of a tuple."""
    return f"({', '.join(map(str, sizes))})"


def interval(ends: Sequence[float] | None) -> str:
    """Return the text of an interval, or "no interval"."""
    return "no interval" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def aim(low: float | None, high: float | None) -> str:
    """Return the target of a figure as text, empty without one.

    Examples
    --------
    >>> [aim(2, None), aim(None, 64), aim(13, 18), aim(None, None)]
    ['≥ 2', '≤ 64', '13 to 18', '']
    """
    if low is None:
        return "" if high is None else f"≤ {high:g}"
    return f"≥ {low:g}" if high is None else f"{low:g} to {high:g}"


def span(texts: Sequence[str]) -> str:
    """Return the first and last of sorted texts, or the only one."""
    ordered = sorted(set(texts))
    if len(ordered) > 1:
        return f"{ordered[0]} to {ordered[-1]}"
    return "".join(ordered)
