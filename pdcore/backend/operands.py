"""The operands of a contraction, and its results.

Shapes: queries (*B, H, G, N, D), with the G query heads of a key head on an axis; keys and values
(*B, H, M, D) and (*B, H, M, Dv).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..spec import Visibility

__all__ = ["Contracted", "Operands"]


class Operands(NamedTuple):
    """The arrays that a contraction reads.

    Attributes
    ----------
    q : array (*B, H, G, N, D)
    k : array (*B, H, M, D)
    v : array (*B, H, M, Dv)
    key_bias : array (*B, H, M) or None
    bias : array broadcastable to (*B, H, G, N, M) or None, of the same rank
    values : mapping of str to array (H, 1, 1, 1), (H, G, 1, 1) or (H, G, n, m)
        Scalars per key head or query head, and tables, of the log kappa expression.
    visibility : Visibility
    keep : callable or None
        Dropout: ``keep(start, stop, first, last, like)`` returns the factors for the weights of a
        block, 0 or 1 / (1 - p), and the same factors in every call for the block.
    fold : object or None
        As in `transforms.Rows`; None unless a transform that a backend chose sets it.
    level : bool
        Whether L is read; where it is not, a contraction may return None in place of L.
    """

    q: Any
    k: Any
    v: Any
    key_bias: Any
    bias: Any
    values: Mapping[str, Any]
    visibility: Visibility
    keep: Callable[[int, int, int, int, Any], Any] | None = None
    fold: Any = None
    level: bool = True

    @property
    def by_query_head(self) -> bool:
        """Whether the query heads of a key head have scalars or tables of their own."""
        return any(x.shape[-3] != 1 for x in self.values.values())


class Contracted(NamedTuple):
    """The results of the contractions of a plan's head groups.

    Attributes
    ----------
    parts : list of (out, L)
        Arrays (*B, H, G, N, Dv) and (*B, H, G, N) for each group.
    whole : (out, L) or None
        The arrays of all heads in the caller's order, if `parts` are views of them.
    """

    parts: list[tuple[Any, Any]]
    whole: tuple[Any, Any] | None = None


def blocks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Cut a range into consecutive blocks."""
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]
