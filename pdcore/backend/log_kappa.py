"""log kappa of a block of queries and keys, from their inner products, places and parameters."""

from __future__ import annotations

from typing import Any

from ..lowering import Scores
from .operands import Operands
from .tables import entry_values

__all__ = ["inputs", "log_weight", "places_of", "terms_of"]


def rows_of(x: Any, start: int, stop: int) -> Any:
    """Cut the row axis (-2) of an array that may be broadcast along it."""
    return x if x.shape[-2] == 1 else x[..., start:stop, :]


def tile(x: Any, start: int, stop: int, first: int, last: int) -> Any:
    """Cut the last two axes of an array that may be broadcast along either."""
    x = rows_of(x, start, stop)
    return x if x.shape[-1] == 1 else x[..., first:last]


def places_of(
    c: Scores, o: Operands, at: tuple[int, int, int, int], dtype: Any, *, xp: Any
) -> dict[str, Any]:
    """Return the distances and labels of a block that log kappa reads, in the dtype of scores."""
    return {name: xp.astype(o.visibility.place(name, *at), dtype) for name in c.places}


def inputs(
    c: Scores, s: Any, o: Operands, at: tuple[int, int, int, int], *, xp: Any
) -> dict[Any, Any]:
    """Return the inputs of the expression of log kappa for queries and keys of a block."""
    assert c.expression is not None
    places = places_of(c, o, at, s.dtype, xp=xp)
    values: dict[Any, Any] = {**o.values, **places}
    for entry in c.expression.entries if places else ():
        values[entry] = entry_values(entry, o.values[entry.table], places, xp=xp)
    return {"s": s, **{name: o.visibility.oriented(x) for name, x in values.items()}}


def terms_of(
    c: Scores, o: Operands, start: int, stop: int, first: int, last: int, *, dtype: Any, xp: Any
) -> Any:
    """Return the sum of the tables that terms add to log kappa in a block."""
    places = places_of(c, o, (start, stop, first, last), dtype, xp=xp)
    tables = ((e, o.values[e.table]) for e in c.removing)
    return sum(entry_values(e, table, places, xp=xp) for e, table in tables)


def log_weight(
    c: Scores, s: Any, o: Operands, start: int, stop: int, first: int, last: int, *, xp: Any
) -> Any:
    """Compute log kappa, biases included, -inf where a key is not visible."""
    at = (start, stop, first, last)
    logits = c.scale * s if c.expression is None else c.expression(inputs(c, s, o, at, xp=xp), xp)
    if isinstance(logits, float):  # a kernel that does not depend on s
        logits = xp.full_like(s, logits)
    if o.key_bias is not None:
        logits = logits + o.key_bias[..., None, None, first:last]
    if o.bias is not None:
        logits = logits + tile(o.bias, start, stop, first, last)
    seen = o.visibility.block(start, stop, first, last)
    if seen is None:
        return logits
    return xp.where(seen, logits, xp.full_like(logits, -xp.inf))
