"""The normaliser h: from (out, L) of a contraction to the results of a head group."""

from __future__ import annotations

from typing import Any

from ..lowering import Features, Plan, Scores
from . import score_contraction
from .operands import Operands
from .raw_features import mapped

__all__ = ["Normaliser"]


class Normaliser:
    """The normaliser h of one head group, applied to (out, L) of its contraction."""

    def __init__(
        self, plan: Plan, o: Operands, out: Any, level: Any, constant: Any, alive: Any, xp: Any
    ) -> None:
        self.h, self.signed = plan.normaliser, plan.contraction.signed
        self.o, self.xp, self.alive = o, xp, alive
        self.out, self.inner = out, level
        self.factor: Any = None
        if level is None:
            return
        if alive is not None:
            level = xp.where(alive, level, xp.full_like(level, -xp.inf))
        # L of an empty row stays -inf whatever the row constant is.
        empty = level == -xp.inf
        self.level = level if constant is None else xp.where(empty, level, level + constant)
        if self.h == "sum":
            return
        counts = o.visibility.counts(o.bias)
        if alive is not None:
            counts = xp.where(alive, counts, xp.zeros_like(counts))
        counts = xp.broadcast_to(counts, level.shape)
        self.seen = counts > 0
        count = xp.astype(xp.where(self.seen, counts, xp.ones_like(counts)), level.dtype)
        self.log_h = xp.log(count) if self.h == "count" else xp.zeros_like(count)
        if constant is None:
            self.factor = xp.exp(level - self.log_h)
        else:
            self.factor = _exp_of_sum(level - self.log_h, constant, xp)

    @property
    def plain(self) -> bool:
        """Whether the contraction's `out` is the result, so that ``d_out`` is its cotangent."""
        return self.factor is None and self.alive is None

    def result(self) -> tuple[Any, Any]:
        """Return (out, lse); lse is None where the contraction returned no L."""
        xp, out = self.xp, self.out
        if self.factor is not None:
            out = out * self.factor[..., None]
        if self.alive is not None:
            out = xp.where(self.alive[..., None], out, xp.zeros_like(out))
        if self.inner is None:
            return out, None
        if self.factor is None:
            return out, self.level
        return out, xp.where(self.seen, self.log_h, xp.full_like(self.log_h, -xp.inf))

    def pull_back(self, d_out: Any, d_lse: Any) -> tuple[Any, Any]:
        """Return the cotangents of the contraction's (out, L)."""
        xp = self.xp
        if self.alive is not None:
            d_out = xp.where(self.alive[..., None], d_out, xp.zeros_like(d_out))
        if self.factor is None:
            d_level = d_lse
        else:
            # The lse of count and one is a constant.
            d_out = d_out * self.factor[..., None]
            d_level = xp.sum(d_out * self.out, axis=-1)
        dead = self.level == -xp.inf
        return d_out, xp.where(dead, xp.zeros_like(d_level), d_level)

    def weights(self, c: Scores | Features, pooling: Any, backend: Any) -> Any:
        """Compute kappa / h for every query and every key of the call."""
        xp, o, inner = self.xp, self.o, self.inner
        if isinstance(c, Features):
            if c.raw:
                o, constant, _ = mapped(c, o, xp=xp)
                inner = inner - constant
            c = Scores("log_features" if c.log else "features", signed=c.signed)
        w = score_contraction.weights(c, o, inner, xp=xp, query_block=backend.query_block)
        if self.factor is not None:
            w = w * self.factor[..., None]
        if self.alive is not None:
            w = xp.where(self.alive[..., None], w, xp.zeros_like(w))
        if pooling is None:
            return w
        spread = w[..., None] * pooling[..., None, None, :, :]
        *lead, count, scale = spread.shape
        return xp.reshape(spread, (*lead, count * scale))[..., : o.visibility.length]


def _exp_of_sum(a: Any, b: Any, xp: Any) -> Any:
    """Compute exp(a + b) without the rounding error of a + b, which grows with |a + b|."""
    total = a + b
    # The rounding error exactly (Knuth's two-sum), of numbers that are finite.
    finite = total > -xp.inf
    x, y, z = (xp.where(finite, t, xp.zeros_like(total)) for t in (a, b, total))
    more = z - x
    return xp.exp(total) * (1.0 + ((x - (z - more)) + (y - more)))
