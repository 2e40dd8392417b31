"""Statistics folded into the queries as a kernel reads them, so that keys are read as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from pdcore.extend import Fold, Pullback, Rows, UnsupportedError

__all__ = ["FoldedLoad", "QueryFold"]

#: The least deviation, relative to the mean, of 16-bit keys that are not all equal: neighbours of
#: 8 bits, of which one in 2^24 differs.
LEAST = 2.0**-20


class QueryFold(NamedTuple):
    """What is done to queries as they are read: q' = (q - centre) factor, and tau q'.gap to L.

    Attributes
    ----------
    centre : array (*B, H, 1, D)
        beta mu.
    factor : array (*B, H, 1, D)
        1 / (var + eps); its negative for a feature in which all keys are equal, whose q' is 0.
    gap : array (*B, H, 1, D)
        tau (c - beta mu).
    """

    centre: Any
    factor: Any
    gap: Any


@dataclass(frozen=True)
class FoldedLoad:
    """`Fold` of statistics of the keys themselves, with c = 0 for keys as the caller gave them.

    A 16-bit key that is not shifted is exact, and what the rounding of q' does to all logits of a
    row alike cancels. Where all keys are equal, and 1 / eps would multiply the rounding of sums,
    c = mu, so that k - c = 0; as it is for pooled keys, which have yet to be rounded.

    Attributes
    ----------
    fold : Fold
    """

    fold: Fold

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Say what the load does, see `transforms.Rows`."""
        mean, var = state["mean"], state["var"]
        centre, factor = self.fold.weight(params) * mean, 1.0 / (var + self.fold.eps)
        equal = var <= (LEAST * mean) ** 2
        exact = rows.k.dtype.itemsize == 2
        shift = xp.where(equal, mean, xp.zeros_like(mean)) if exact else mean
        fold = QueryFold(
            centre, xp.where(equal, -factor, factor), self.fold.scale * (shift - centre)
        )

        def pullback(d: Rows) -> Any:
            raise UnsupportedError(
                "the fold in the query load has no pullback; choose the plan of a call with "
                "gradients by a Request with vjp=True, which keeps pdcore.lowering.transforms.Fold"
            )

        return rows._replace(k=rows.k if exact else rows.k - mean, fold=fold), pullback
