"""The normaliser h: from (out, L) of a contraction to the results of a head group."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..lowering import Features, Plan, Scores, sum_to
from . import log_kappa, score_contraction
from .operands import Operands
from .raw_features import mapped

__all__ = ["Normaliser"]


class Normaliser:
    """The normaliser h of one head group, applied to (out, L) of its contraction.

    Attributes
    ----------
    factor : array (*B, H, G, N) or None
        What h multiplies `out` of the contraction by.
    level : array (*B, H, G, N)
        The log of the summed weights, with the row constant.
    lse : array (*B, H, G, N)
        log h.
    """

    def __init__(
        self,
        plan: Plan,
        o: Operands,
        out: Any,
        level: Any,
        constant: Any,
        alive: Any,
        sink: Any,
        xp: Any,
    ) -> None:
        self.o, self.xp, self.alive = o, xp, alive
        self.out, self.inner, self.sink = out, level, sink
        self.factor: Any = None
        if level is None:
            return
        if alive is not None:
            level = xp.where(alive, level, xp.full_like(level, -xp.inf))
        # L of an empty row stays -inf whatever the row constant is.
        empty = level == -xp.inf
        self.level = level if constant is None else xp.where(empty, level, level + constant)
        self.lse = self.level
        if plan.normaliser != "sum":
            self._divide_by_count(plan, level, constant)
        elif sink is not None:
            self._add_sink(empty)

    def _divide_by_count(self, plan: Plan, level: Any, constant: Any) -> None:
        """Replace the sum of weights by the number of visible keys, or by 1."""
        xp, o, h = self.xp, self.o, plan.normaliser
        c, terms = plan.contraction, None
        if isinstance(c, Scores) and c.removing:
            terms = partial(log_kappa.terms_of, c, o, dtype=level.dtype, xp=xp)
        counts = o.visibility.counts(o.bias, terms)
        if self.alive is not None:
            counts = xp.where(self.alive, counts, xp.zeros_like(counts))
        counts = xp.broadcast_to(counts, level.shape)
        seen = counts > 0
        count = xp.astype(xp.where(seen, counts, xp.ones_like(counts)), level.dtype)
        log_h = xp.log(count) if h == "count" else xp.zeros_like(count)
        if constant is None:
            self.factor = xp.exp(level - log_h)
        else:
            self.factor = _exp_of_sum(level - log_h, constant, xp)
        self.lse = xp.where(seen, log_h, xp.full_like(log_h, -xp.inf))

    def _add_sink(self, empty: Any) -> None:
        """Add exp(s) to the sum of weights, for a sink s (H, G, 1) or a number.

        -inf is selected before it is subtracted from another -inf, which would be NaN.
        """
        xp, level = self.xp, self.level
        s = xp.full_like(level, self.sink) if isinstance(self.sink, float) else self.sink
        absent, zero = s == -xp.inf, xp.zeros_like(level)
        finite = xp.where(empty, zero, level), xp.where(absent, xp.zeros_like(s), s)
        total = xp.logaddexp(*finite)
        share = xp.where(absent, xp.ones_like(level), xp.exp(finite[0] - total))
        self.factor = xp.where(empty, zero, share)
        # The share of the sink in h, of which only a pullback reads more than the exponent.
        self.exponent = xp.where(absent, xp.full_like(level, -xp.inf), finite[1] - total)
        self.exponent = xp.where(empty & ~absent, zero, self.exponent)
        self.lse = xp.where(absent, level, xp.where(empty, s, total))

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
        return out, None if self.inner is None else self.lse

    def pull_back(self, d_out: Any, d_lse: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Return the cotangents of the contraction's (out, L), and of parameters by name."""
        xp, d_params = self.xp, {}
        if self.alive is not None:
            d_out = xp.where(self.alive[..., None], d_out, xp.zeros_like(d_out))
        if self.factor is None:
            d_level = d_lse
        else:
            # The lse of count and one is a constant.
            d_out = d_out * self.factor[..., None]
            d_level = xp.sum(d_out * self.out, axis=-1)
        if self.sink is not None:
            share = xp.exp(self.exponent)
            if not isinstance(self.sink, float):
                d_sink = sum_to(share * (d_lse - d_level), self.sink.shape, xp=xp)
                d_params["sink"] = d_sink[..., 0]
            d_level = self.factor * d_lse + share * d_level
        dead = self.level == -xp.inf
        return d_out, xp.where(dead, xp.zeros_like(d_level), d_level), d_params

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
