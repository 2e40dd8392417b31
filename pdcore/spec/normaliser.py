"""The axis of the normaliser: h, and the sink of h(sum)."""

from __future__ import annotations

import math
from typing import Any

from ..errors import SpecError, UnsupportedError, nearest
from .kernel_base import Kernel, Parameter

__all__ = ["SINK", "check_normaliser", "checked_sink", "normaliser_word", "read_normaliser"]

NORMALISERS = ("sum", "count", "one")

#: The parameter of ``h(sum,sink=param)``: s of every query head.
SINK = Parameter("sink", (("Hq",),), start=0.0)


def checked_sink(sink: Any) -> float | str | None:
    """Return a sink as a float, ``"param"`` or None.

    Raises
    ------
    SpecError
        For anything else, and for a number that is not finite.
    """
    number = isinstance(sink, (int, float)) and not isinstance(sink, bool)
    if number and math.isfinite(sink):
        return float(sink)
    if sink is None or (isinstance(sink, str) and sink == "param"):
        return sink
    raise SpecError(f"h: sink is {sink!r}, expected a finite number, or param for params['sink']")


def check_normaliser(normaliser: str, sink: float | str | None, kernel: Kernel) -> None:
    """Raise for a normaliser that is unknown, or that the kernel does not have.

    Raises
    ------
    SpecError, UnsupportedError
    """
    if normaliser not in NORMALISERS:
        raise SpecError(f"h: got {normaliser!r}; {nearest(str(normaliser), NORMALISERS)}")
    if sink is None:
        if kernel.signed and normaliser == "sum":
            raise UnsupportedError(
                f"{kernel.word} may be negative, so its sum is no normaliser: "
                "add h(count) or h(one)"
            )
        return
    if normaliser != "sum":
        raise UnsupportedError(
            f"h({normaliser}) has no sink, which is a term of the sum of kappa: "
            f"write h(sum,sink=...), or h({normaliser}) alone"
        )
    if not kernel.has_log:
        raise UnsupportedError(
            f"h(sum,sink={_text(sink)}): a sink is given as a logarithm beside log kappa, which "
            f"{kernel.word} does not have: leave the sink out, or use a kernel with a log"
        )


def read_normaliser(
    arguments: str | None, positional: list[Any], named: dict[str, Any]
) -> tuple[str, float | str | None]:
    """Return the normaliser and the sink that the arguments of ``h`` say."""
    if len(positional) != 1 or positional[0] not in NORMALISERS or set(named) - {"sink"}:
        raise SpecError(
            f"h({arguments or ''}): expected h(sum), h(sum,sink=param), h(count) or h(one)"
        )
    return positional[0], checked_sink(named.get("sink"))


def normaliser_word(normaliser: str, sink: float | str | None) -> str:
    """Write the word of a normaliser; empty for the default."""
    if sink is not None:
        return f"h({normaliser},sink={_text(sink)})"
    return "" if normaliser == "sum" else f"h({normaliser})"


def _text(sink: float | str) -> str:
    whole = isinstance(sink, float) and sink.is_integer() and abs(sink) < 1e16
    return str(int(sink) if whole else sink)
