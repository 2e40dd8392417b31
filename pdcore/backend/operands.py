"""The operands of a contraction, and its results.

Shapes: queries (*B, H, G, N, D), with the G query heads of a key head on an axis; keys and values
(*B, H, M, D) and (*B, H, M, Dv).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..spec import Visibility
from .dropout import Dropout

__all__ = ["Carried", "Contracted", "Operands"]


class Carried(NamedTuple):
    """The arrays of a head group that a decoder carries, in place of steps of the plan.

    Attributes
    ----------
    k, v : array (*B, H, K, D) and (*B, H, K, Dv)
        Keys and values as the contraction counts them: pooled, in the group's scale.
    key_mask : bool array (*B, K) or None
        True for a key that exists.
    offset : int or integer array (*B,)
        The position of query 0, where key j begins at position j s.
    state : mapping of str to array
        The finalised statistics of each query, (*B, H, N, D).
    points : mapping of str to array
        What transforms choose by all keys so far: ``first`` (*B, H, 1, D), the first key, to which
        `k` is then relative, and ``largest`` (*B, H, 1, 1), the largest entry of keys.
    before : tuple of array, or None
        Of features: the sums (*B, H, F, Dv + 1) over keys before these of phi(k) [v, 1], and the
        logs (*B, H, 1, F) of what they are relative to for log features, otherwise None.
    """

    k: Any
    v: Any
    key_mask: Any = None
    offset: Any = 0
    state: Mapping[str, Any] = {}
    points: Mapping[str, Any] = {}
    before: tuple[Any, Any] | None = None


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
    dropout : Dropout or None
        What drops weights after the normalization.
    fold : object or None
        As in `transforms.Rows`; None unless a transform that a backend chose sets it.
    level : bool
        Whether L is read; where it is not, a contraction may return None in place of L.
    before : tuple of array, or None
        As in `Carried`; only `feature_contraction.features` reads it.
    """

    q: Any
    k: Any
    v: Any
    key_bias: Any
    bias: Any
    values: Mapping[str, Any]
    visibility: Visibility
    dropout: Dropout | None = None
    fold: Any = None
    level: bool = True
    before: tuple[Any, Any] | None = None

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
