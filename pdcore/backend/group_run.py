"""`GroupRun`, the steps of `ArrayBackend` for the heads of one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..lowering import Group, Pullback, Rows, Scores, add_into, sum_to
from ..spec import Visibility, heads
from .call import Call, cut_heads
from .normaliser import Normaliser
from .operands import Operands

if TYPE_CHECKING:
    from .array_backend import ArrayBackend

__all__ = ["GroupRun"]

Arrays = Mapping[str, Any]


class GroupRun:
    """The steps of a plan for one head group of a call, and their pullbacks.

    Each step reads and replaces the attributes that the step before has left. A backend replaces
    the computation of a step by the hooks of `ArrayBackend`, or a whole step in a subclass that
    its `ArrayBackend.group_run` returns.

    Attributes
    ----------
    q : array (*B, H, G, N, D)
        Queries, with the G heads that share a key head on an axis.
    k, v : array (*B, H, M, D) and (*B, H, M, Dv)
        Keys and values, pooled after the first step.
    key_mask : bool array (*B, 1, M) or None
        True for a real key, pooled likewise.
    weights : array or None
        The weight of each key in its window, see `heads.pooling_weights`.
    state : mapping of str to array
        The finalised statistics as the transforms read them.
    alive : bool array (*B, H, G, N) or None
        With prefix statistics, whether a row's statistics count a key.
    operands : Operands
        What the contraction reads.
    out, lse : array
        The results of the group.
    """

    weights: Any = None
    alive: Any = None
    operands: Operands

    def __init__(self, backend: ArrayBackend, call: Call, group: Group) -> None:
        self.backend, self.call, self.group = backend, call, group
        xp = self.xp = call.xp
        self.q, self.k, self.v = call.q, call.k, call.v
        if call.several:
            self.q = cut_heads(self.q, group.heads, -4, xp)
            self.k = cut_heads(self.k, group.heads, -3, xp)
            self.v = cut_heads(self.v, group.heads, -3, xp)
        self.key_mask = call.key_mask
        carried = self.carried = None if call.carried is None else call.carried[group]
        if carried is not None:
            self.k, self.v, mask = carried.k, carried.v, carried.key_mask
            self.key_mask = None if mask is None else mask[..., None, :]
        self.params = call.params(group) if call.inputs.params else {}
        self.state: Arrays = {}

    def prepare(self) -> Operands:
        """Run the steps before the contraction, and return its operands."""
        if self.group.scale > 1 and self.carried is None:
            self.pool()
        self.visibility = self.call.visibility(self.group, self.key_mask)
        if self.carried is not None:
            of_rows = _spread(self.carried.state, self.q.shape, self.xp)
            self.state = {**of_rows, **self.carried.points}
        elif self.call.plan.summary is not None:
            self.summarise()
        self.transform()
        return self.operands

    def pool(self) -> None:
        """Pool keys and values over windows."""
        call, plan, scale, xp = self.call, self.call.plan, self.group.scale, self.xp
        like = call.cast(call.k[..., :0])
        length = self.k.shape[-2]
        weights = heads.pooling_weights(length, self.key_mask, scale, plan.pool, like, xp=xp)
        if self.key_mask is not None:
            self.key_mask = xp.any(weights > 0, axis=-1)
        pool = self.backend.pool_of(plan)
        self.k, self.k_pullback = pool(plan.pool, call.read_by("pool", self.k), weights)
        self.v, self.v_pullback = pool(plan.pool, call.read_by("pool", self.v), weights)
        self.weights = weights

    def summarise(self) -> None:
        """Compute the statistics of the keys; with prefix statistics, those of each row too."""
        call, summary = self.call, self.call.plan.summary
        assert summary is not None
        keys = call.read_by("statistics", self.k)
        self.final = self.backend.statistics(summary, keys, self._mask())
        if self._next_step() not in call.native:
            self.k = keys
        self.state = self.final
        if summary.scope == "prefix":
            self.state = _at_rows(self.final, self.visibility, self.q.shape, self.xp)

    def transform(self) -> None:
        """Transform queries and keys, and build the operands of the contraction."""
        call, xp, shape, step = self.call, self.xp, self.q.shape, self._next_step()
        flat = xp.reshape(self.q, (*shape[:-3], shape[-3] * shape[-2], shape[-1]))
        rows = Rows(call.read_by(step, flat), call.read_by(step, self.k), key_mask=self.key_mask)
        self.pullbacks: list[Pullback] = []
        for transform in call.plan.transforms:
            transform = getattr(transform, "choice", None) or transform
            rows, pullback = transform(rows, self.state, self.params, xp=xp)
            self.pullbacks.append(pullback)
        self.rows = rows
        summary = call.plan.summary
        if summary is not None and summary.scope == "prefix":
            self.alive = xp.reshape(self.state["n"], shape[:-1]) > 0
        q = xp.reshape(rows.q, (*shape[:-1], rows.q.shape[-1]))
        self.operands = self.operands_of(q, rows.k, self.v, rows.key_bias, rows.fold)

    def operands_of(
        self, q: Any, k: Any, v: Any, key_bias: Any = None, fold: Any = None
    ) -> Operands:
        """Build the operands of the contraction, with queries (*B, H, G, N, D)."""
        call, c, bias = self.call, self.call.plan.contraction, self.call.bias
        if bias is not None:
            bias = call.read_by("contraction", cut_heads(bias, self.group.heads, -4, self.xp))
        scalars: dict[str, Any] = {}
        if isinstance(c, Scores) and c.scalars:
            scalars = {name: self._scalar(name) for name in c.scalars}
        dropout = call.dropout(self.group) if call.inputs.dropout else None
        v = call.read_by("contraction", v)
        before = None if self.carried is None else self.carried.before
        more = (self.visibility, dropout, fold, call.level, before)
        return Operands(q, k, v, key_bias, bias, scalars, *more)

    def _scalar(self, name: str) -> Any:
        """Return a parameter of log kappa as `Operands.values` has it."""
        x = self.params[name]
        if name not in self.call.plan.by_query_head:
            return x[..., None]
        return self.xp.reshape(x, (*x.shape[:2], *((1, 1), (1,), ())[x.ndim - 2], *x.shape[2:]))

    def finish(self, out: Any, level: Any) -> None:
        """Turn (out, L) of the contraction into the group's results."""
        call = self.call
        self.contracted = out, level
        if not call.level and self.alive is None:
            self.out, self.lse = out, None
            return
        constant = self.rows.row_constant if call.level else None
        if constant is not None:
            constant = self.xp.reshape(constant, self.q.shape[:-1])
        level = level if call.level else None
        sink = self.params["sink"][..., None] if call.plan.sink == "param" else call.plan.sink
        self.normaliser = Normaliser(
            call.plan, self.operands, out, level, constant, self.alive, sink, self.xp
        )
        self.out, self.lse = self.normaliser.result()

    def attention_weights(self) -> Any:
        """Compute the weights (*B, H, G, N, M) of the group."""
        return self.normaliser.weights(self.call.plan.contraction, self.weights, self.backend)

    # The pullback.

    def pull_back(self, d_out: Any, d_lse: Any) -> dict[str, Any]:
        """Pull cotangents of the results back to q, k, v, a bias and parameters."""
        grads, d_constant, d_sink = self.pull_contraction(d_out, d_lse)
        cotangent, d_state, d_params = self.pull_transforms(grads, d_constant)
        dk = self.pull_statistics(cotangent.k, d_state) if d_state else cotangent.k
        dv = grads["v"]
        if self.weights is not None:
            dk, dv = self.k_pullback(dk), self.v_pullback(dv)
        dq = self.xp.reshape(cotangent.q, self.q.shape)
        bias = {} if self.operands.bias is None else {"bias": grads["bias"]}
        return {"q": dq, "k": dk, "v": dv, **d_params, **d_sink, **bias}

    def pull_contraction(
        self, d_out: Any, d_lse: Any
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """Pull cotangents of the results back to operands, row constant and normaliser."""
        call, backend, c = self.call, self.backend, self.call.plan.contraction
        if not self.normaliser.plain or d_out.dtype != call.dtype:
            d_out = call.cast(d_out)
        d_out = call.read_by("contraction", d_out)
        d_out, d_level, d_sink = self.normaliser.pull_back(d_out, d_lse)
        arguments = (self.operands, *self.contracted, d_out, d_level)
        if isinstance(c, Scores):
            return backend.scores_vjp(c, *arguments), d_level, d_sink
        return backend.features_vjp(c, *arguments), d_level, d_sink

    def pull_transforms(
        self, grads: dict[str, Any], d_constant: Any
    ) -> tuple[Rows, dict[str, Any], dict[str, Any]]:
        """Pull back to rows before the transforms, to the statistics and to parameters."""
        xp, rows, scalars = self.xp, self.rows, self.operands.values
        constant = rows.row_constant
        cotangent = Rows(
            xp.reshape(grads["q"], rows.q.shape),
            grads["k"],
            grads.get("key_bias"),
            None if constant is None else xp.reshape(d_constant, constant.shape),
        )
        d_state: dict[str, Any] = {}
        d_params = {n: sum_to(grads[n], scalars[n].shape, xp=xp) for n in scalars}
        for pullback in reversed(self.pullbacks):
            before, of_state, of_params = pullback(cotangent)
            cotangent = before._replace(key_bias=None, row_constant=None)
            add_into(d_state, of_state)
            add_into(d_params, of_params)
        return cotangent, d_state, d_params

    def pull_statistics(self, dk: Any, d_state: Arrays) -> Any:
        """Add the cotangent of the statistics, pulled back to the keys."""
        summary, xp, shape = self.call.plan.summary, self.xp, self.q.shape
        assert summary is not None
        keys, mask = self.call.read_by("statistics_vjp", self.k), self._mask()
        if summary.scope != "prefix":
            return dk + self.backend.statistics_vjp(summary, keys, mask, self.final, d_state)
        # The cotangents (*B, H, G N, D) of the states that each row read, summed over G.
        cotangent = {
            n: xp.sum(xp.reshape(d, (*shape[:-1], d.shape[-1])), axis=-3)
            for n, d in d_state.items()
        }
        rows = _at_rows(self.final, self.visibility, (*shape[:-3], 1, *shape[-2:]), xp)
        later = self.visibility.later_rows()
        return dk + self.backend.prefix_vjp(summary, keys, mask, rows, cotangent, later)

    def _mask(self) -> Any:
        """Return the key mask in the shape that statistics read, (*B, 1, M, 1)."""
        return None if self.key_mask is None else self.key_mask[..., None]

    def _next_step(self) -> str:
        """Return the name of the step that reads the keys after the statistics."""
        return "transforms" if self.call.plan.transforms else "contraction"


def _at_rows(
    final: Arrays, visibility: Visibility, shape: tuple[int, ...], xp: Any
) -> dict[str, Any]:
    """Return the prefix state of each query row, (*B, H, G N, D)."""
    rows = visibility.rows
    counts = visibility.prefix_counts(0, rows)
    first, last = visibility.first_prefix(0), visibility.first_prefix(rows - 1)
    state = {}
    for name, value in final.items():
        if first is not None and last == first + rows - 1:  # counts grow by at most one a row
            picked = value[..., first : first + rows, :]
        elif visibility.static:
            picked = xp.take(value, counts[:, 0], axis=-2)
        else:
            index = xp.broadcast_to(
                counts[..., 0, :, :], (*value.shape[:-2], shape[-2], value.shape[-1])
            )
            picked = xp.take_along_axis(value, index, axis=-2)
        state[name] = picked
    return _spread(state, shape, xp)


def _spread(state: Arrays, shape: tuple[int, ...], xp: Any) -> dict[str, Any]:
    """Repeat states of rows (*B, H, N, D) for the G query heads of a key head, (*B, H, G N, D)."""
    *lead, groups, rows, _ = shape
    spread = {}
    for name, x in state.items():
        x = xp.broadcast_to(x[..., None, :, :], (*shape[:-1], x.shape[-1]))
        spread[name] = xp.reshape(x, (*lead, groups * rows, x.shape[-1]))
    return spread
