"""Attention-BN under the exponential kernel: softmax attention of other queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ..spec import Batch
from .plan import Transform
from .transforms import Gradients, Pullback, Rows, first_real, sum_to

__all__ = ["BatchRows", "ConstantFeature", "Fold", "Recentre", "Unread"]


@dataclass(frozen=True)
class BatchRows(ABC):
    """A transform by the statistics of Attention-BN, after which scores are tau q'.k'.

    k' is k - c up to a factor, and tau q'.(c - beta mu) is constant along the row. The result is
    the same for any shift c. c = mu keeps k - c small where |mu| >> sigma. With prefix statistics
    c must not depend on keys after the row, so c is the first real key, which satisfies
    |c - mu_p| <= sqrt(n_p) sigma_p for every row p that sees it.

    Attributes
    ----------
    batch : Batch
        The normalization.
    scale : float
        tau.
    """

    batch: Batch
    scale: float

    @property
    def of(self) -> str:
        """The keys of the statistics: of a ``"sequence"``, a ``"batch"`` or every ``"prefix"``.

        ``"running"`` statistics are parameters of the call.
        """
        return self.batch.statistics

    @property
    def beta(self) -> float | None:
        """The weight of the mean; None where the weight is the call's parameter ``beta``."""
        beta = self.batch.beta
        return None if isinstance(beta, str) else beta

    def weight(self, params: Any) -> Any:
        """Return the weight of the mean: a number, or the call's parameter."""
        return self.batch.weight(params)

    def relative(self, k: Any, shift: Any, state: Any) -> Any:
        """Return k - c, which are the keys that a decoder carries."""
        return k if self.of == "prefix" and "first" in state else k - shift

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback; see `Rows`."""
        if self.of == "prefix":
            # A decoder carries the first key, and keys that are relative to it.
            shift = state.get("first")
            if shift is None:
                shift = first_real(rows.k, rows.key_mask, xp=xp)
        else:
            shift = (params if self.of == "running" else state)["mean"]
        return self.about(shift, rows, state, params, xp=xp)

    def queries(self, q: Any, state: Any, params: Any, *, xp: Any) -> Any:
        """Return q', which depends on no key but by the state."""
        nowhere = xp.zeros_like(q[..., :1, :])
        return self.about(nowhere, Rows(q, q[..., :0, :]), state, params, xp=xp)[0].q

    @abstractmethod
    def about(
        self, shift: Any, rows: Rows, state: Any, params: Any, *, xp: Any
    ) -> tuple[Rows, Pullback]:
        """Transform with the shift c = `shift`, (*B, H, 1, D), for backends that choose c."""


@dataclass(frozen=True)
class Fold(BatchRows):
    """Attention-BN with the exponential kernel, folded into softmax attention of other queries.

    tau T(q).T(k) = tau q'.(k - c) + tau q'.(c - beta mu) with q' = (q - beta mu) / (var + eps).

    Attributes
    ----------
    batch, scale
        As in `BatchRows`.
    split : bool
        Divide queries and keys by sigma instead of queries by sigma^2, which would leave the range
        of float16.
    closed : bool
        Whether a row sees only keys that its statistics count. If the statistics of such a row
        count a single key, k - c = 0, and the contraction gets q' = 0: the row's q' is divided by
        eps alone, and would amplify rounding errors in the gradient.
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    split: bool = False
    closed: bool = False
    choice: Transform | None = None

    @property
    def eps(self) -> float:
        """The number that is added to the variance."""
        return self.batch.eps

    def queries(self, q: Any, state: Any, params: Any, *, xp: Any) -> Any:
        """Return (q - beta mu) / (var + eps), or by sigma, see `split`."""
        moments = params if self.of == "running" else state
        inverse = 1.0 / (moments["var"] + self.eps)
        factor = xp.sqrt(inverse) if self.split else inverse
        return (q - self.weight(params) * moments["mean"]) * factor

    def about(
        self, shift: Any, rows: Rows, state: Any, params: Any, *, xp: Any
    ) -> tuple[Rows, Pullback]:
        """Transform with the shift c = `shift`, (*B, H, 1, D), for backends that choose c."""
        batch, running = self.batch, self.of == "running"
        moments = params if running else state
        mean, beta = moments["mean"], batch.weight(params)
        inverse = 1.0 / (moments["var"] + batch.eps)
        centre, centred = beta * mean, self.relative(rows.k, shift, state)
        root: Any = xp.sqrt(inverse) if self.split else None
        folded = (rows.q - centre) * (root if self.split else inverse)
        k = centred * root if self.split else centred
        gap = self.scale * (shift - centre)
        if self.split:
            gap = gap * root
        constant = xp.sum(folded * gap, axis=-1)
        several = state["n"] > 1 if self.closed else None
        seen = folded if several is None else xp.where(several, folded, xp.zeros_like(folded))

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            # c counts as a constant, as the result does not depend on it; except in rows whose
            # q' was set to 0, where the row constant depends on the keys through c = mu alone.
            drow = d.row_constant[..., None]
            dq = d.q if several is None else xp.where(several, d.q, xp.zeros_like(d.q))
            dq = dq + drow * gap
            factor = root if self.split else inverse
            dcentre = sum_to(-dq * factor, mean.shape, xp=xp)
            pull = self.scale * root if self.split else self.scale
            dcentre = dcentre - sum_to(drow * folded * pull, mean.shape, xp=xp)
            dfactor = sum_to(dq * (rows.q - centre), mean.shape, xp=xp)
            dk = d.k
            if self.split:
                dfactor = dfactor + sum_to(d.k * centred, mean.shape, xp=xp)
                dfactor = dfactor + sum_to(
                    drow * folded * (self.scale * (shift - centre)), mean.shape, xp=xp
                )
                dk, dvar = d.k * root, -0.5 * inverse * root * dfactor
            else:
                dvar = -inverse * inverse * dfactor
            dstate: dict[str, Any] = {}
            dparams: dict[str, Any] = {}
            if not running:
                dstate = {"mean": beta * dcentre, "var": dvar}
                if several is not None:
                    dshift = xp.where(several, xp.zeros_like(folded), drow * folded * pull)
                    dstate["mean"] = dstate["mean"] + sum_to(dshift, mean.shape, xp=xp)
            if batch.beta == "param":
                dparams = {"beta": sum_to(dcentre * mean, params["beta"].shape, xp=xp)}
            return Rows(dq * factor, dk), dstate, dparams

        return rows._replace(q=seen, k=k, row_constant=constant), pullback


@dataclass(frozen=True)
class Recentre(BatchRows):
    """Attention-BN without division, with the exponential kernel: queries less a point.

    tau T(q).T(k) = tau q'.(k - c) + tau q'.(c - beta mu) with q' = q - beta mu. With c = 0 the keys
    are those of the caller. A kernel that reads q' in 16 bits then has to compute the row constant
    from q' as it was rounded, so that the rounding error meets k - beta mu and not k.

    Attributes
    ----------
    batch, scale
        As in `BatchRows`.
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    choice: Transform | None = None

    def queries(self, q: Any, state: Any, params: Any, *, xp: Any) -> Any:
        """Return q - beta mu."""
        return q - self.weight(params) * (params if self.of == "running" else state)["mean"]

    def about(
        self, shift: Any, rows: Rows, state: Any, params: Any, *, xp: Any
    ) -> tuple[Rows, Pullback]:
        """Transform with the shift c = `shift`, (*B, H, 1, D), for backends that choose c."""
        batch, running = self.batch, self.of == "running"
        mean, beta = (params if running else state)["mean"], batch.weight(params)
        gap = self.scale * (shift - beta * mean)
        q = rows.q - beta * mean

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            # c counts as a constant, as the result does not depend on it.
            drow = d.row_constant[..., None]
            dq = d.q + drow * gap
            dcentre = sum_to(-dq - self.scale * drow * q, mean.shape, xp=xp)
            dstate = {} if running else {"mean": beta * dcentre}
            dparams = {}
            if batch.beta == "param":
                dparams = {"beta": sum_to(dcentre * mean, params["beta"].shape, xp=xp)}
            return Rows(dq, d.k), dstate, dparams

        constant = xp.sum(q * gap, axis=-1)
        k = self.relative(rows.k, shift, state)
        return rows._replace(q=q, k=k, row_constant=constant), pullback


@dataclass(frozen=True)
class ConstantFeature:
    """Statistics of each row, for kernels of s = T_p(q).T_p(k), by one more feature.

    T differs from row to row, but s = q'.(k - c) + q'.(c - beta mu_p) is an inner product of rows
    [q', q'.(c - beta mu_p)] and keys [k - c, 1]. The feature is as large as the scores, and 16 bits
    do not hold it.

    Attributes
    ----------
    rows : Transform
        A `BatchRows`: q', k - c and the row constant q'.(c - beta mu_p), with tau = 1.
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    rows: Transform
    choice: Transform | None = None

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback; see `Rows`."""
        inner, pull = self.rows(rows, state, params, xp=xp)
        q = xp.concat([inner.q, inner.row_constant[..., None]], axis=-1)
        k = xp.concat([inner.k, xp.ones_like(inner.k[..., :1])], axis=-1)

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            return pull(Rows(d.q[..., :-1], d.k[..., :-1], row_constant=d.q[..., -1]))

        return inner._replace(q=q, k=k, row_constant=None), pullback


@dataclass(frozen=True)
class Unread:
    """Parameters of the call that change no result: their gradient is 0, and no NaN leaves them.

    Attributes
    ----------
    names : tuple of str
        The parameters.
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    names: tuple[str, ...]
    choice: Transform | None = None

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Return the rows unchanged, but derived from the parameters; see `Rows`."""
        q = rows.q
        for name in self.names:
            x = params[name]
            nothing = xp.where(xp.zeros_like(x, dtype=xp.bool), x, xp.zeros_like(x))
            q = q + xp.sum(nothing)

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            return d, {}, {name: xp.zeros_like(params[name]) for name in self.names}

        return rows._replace(q=q), pullback
