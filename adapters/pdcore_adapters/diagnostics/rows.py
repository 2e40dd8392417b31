"""Some queries of a call, so that its weights never stand in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from array_api_compat import array_namespace, device

from pdcore import UnsupportedError
from pdcore.extend import Inputs

__all__ = ["blocks", "check_rows", "some_rows"]


def check_rows(rows: Any, count: int) -> slice:
    """Return `rows` as a slice of `count` queries, and raise for anything else.

    Raises
    ------
    TypeError, ValueError
        For no slice, one with a step, and one without any query.
    """
    if not isinstance(rows, slice):
        raise TypeError(
            f"rows: got {type(rows).__name__}, expected a slice of the {count} queries, "
            "such as slice(0, 64)"
        )
    start, stop, step = rows.indices(count)
    if step != 1 or stop <= start:
        raise ValueError(
            f"rows: got {rows}, expected a slice with one or more of the {count} queries, "
            "without a step"
        )
    return slice(start, stop)


def blocks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover `count` queries."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def some_rows(inputs: Inputs, rows: slice) -> Inputs:
    """Return the call of some queries, each at the position that it has in the whole call.

    Parameters
    ----------
    inputs : Inputs
        q, k and v are (*B, H, N, D).
    rows : slice
        Without a step.

    Raises
    ------
    UnsupportedError
        For packed sequences, where a part of the queries would have other positions.
    """
    q = inputs.q
    n = q.shape[-2]
    if rows == slice(0, n):
        return inputs
    if inputs.segments is not None:
        raise UnsupportedError(
            "rows: got a part of the queries of packed sequences, whose positions are those in "
            "their segments; pass each sequence in a call of its own, or rows=slice(None)"
        )
    cut: dict[str, Any] = {"q": q[..., rows, :]}
    for name in ("mask", "bias"):
        x = getattr(inputs, name)
        if x is not None and x.ndim > 1 and x.shape[-2] > 1:
            cut[name] = x[..., rows, :]
    labels = inputs.labels
    if labels is not None:
        of_rows, of_keys = labels if isinstance(labels, tuple | list) else (labels, labels)
        cut["labels"] = (of_rows[..., rows], of_keys)
    cut["offset"] = _first(inputs) + rows.start
    return inputs._replace(**cut)


def _first(inputs: Inputs) -> Any:
    """Return the position of the first query."""
    offset, key_mask = inputs.offset, inputs.key_mask
    if not isinstance(offset, str):
        return offset
    n, m = inputs.q.shape[-2], inputs.k.shape[-2]
    if key_mask is None:
        return m - n
    xp: Any = array_namespace(key_mask)
    places = xp.arange(m, device=device(key_mask))
    last = xp.max(xp.where(key_mask, places, xp.full_like(places, -1)), axis=-1)
    return last - (n - 1)
