"""Statistics folded into the queries in the load of a kernel, so that keys stay unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from pdcore.extend import Fold, Pullback, Recentre, Rows, UnsupportedError

__all__ = ["FoldedLoad", "QueryFold"]

#: The smallest deviation, relative to the mean, of 16-bit keys that are not all equal: keys of 8
#: significant bits that are adjacent numbers, where one of 2^24 keys differs.
LEAST = 2.0**-20


class QueryFold(NamedTuple):
    """The change to queries in the load: q' = (q - centre) factor; tau q'.gap is added to L.

    Attributes
    ----------
    centre : array (*B, H, 1, D)
        beta mu.
    factor : array (*B, H, 1, D)
        1 / (var + eps), or 1 without division; its negative for a feature in which all keys are
        equal, whose q' is 0.
    gap : array (*B, H, 1, D)
        tau (c - beta mu).
    """

    centre: Any
    factor: Any
    gap: Any


@dataclass(frozen=True)
class FoldedLoad:
    """`Fold` or `Recentre` in the load of queries, with c = 0 for keys that are read unchanged.

    A 16-bit key that is not shifted is exact, and an error that the rounding of q' makes in all
    logits of a row alike cancels: in `out`, and in L because the kernel computes the row constant
    from the rounded q'. In a feature where all keys are equal, 1 / eps would multiply the rounding
    error of sums, so c = mu and k - c = 0. For pooled keys, which have not been rounded yet, c = mu
    too.

    Attributes
    ----------
    fold : Fold or Recentre
    """

    fold: Fold | Recentre

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Return the rows with a `QueryFold`, see `transforms.Rows`."""
        mean = state["mean"]
        centre, factor = self.fold.weight(params) * mean, xp.ones_like(mean)
        equal = xp.zeros_like(mean, dtype=xp.bool)
        if isinstance(self.fold, Fold):
            factor = 1.0 / (state["var"] + self.fold.eps)
            equal = state["var"] <= (LEAST * mean) ** 2
        exact = rows.k.dtype.itemsize == 2
        shift = xp.where(equal, mean, xp.zeros_like(mean)) if exact else mean
        fold = QueryFold(
            centre, xp.where(equal, -factor, factor), self.fold.scale * (shift - centre)
        )

        def pullback(d: Rows) -> Any:
            raise UnsupportedError(
                "the fold in the query load has no pullback; choose the plan of a call with "
                "gradients by a Request with vjp=True, which keeps `BatchRows`"
            )

        return rows._replace(k=rows.k if exact else rows.k - mean, fold=fold), pullback
