"""`ArrayBackend`: every plan, in array-API calls, for any array library.

A new plugin names its library and is complete; it then overrides `scores`, `features`,
`statistics` or `pool` (and the pullbacks of the two contractions) with fast code, one at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from . import feature_contraction, heads, score_contraction
from .arrays import dtype_name
from .backend import FEATURES, Backend, Inputs, Request
from .kernels import FeatureMap, PointwiseKernel
from .normalization import Identity
from .operands import Operands
from .plan import Features, Group, Plan, Scores, Summary
from .statistics import Moments, prefix_states, reduce_axis
from .support import Visibility
from .transform import Pullback, Rows, add_into, sum_to

__all__ = ["ArrayBackend"]


@dataclass
class _GroupRun:
    """The heads of one scale on their way through a plan."""

    out: Any
    lse: Any
    vjp: Callable[[Any, Any], dict[str, Any]] | None
    weights: Callable[[], Any]


class ArrayBackend(Backend):
    """Runs every plan with array-API calls, blocked over queries and keys.

    Attributes
    ----------
    query_block, key_block : int
        The block of scores that exists at a time, per head.
    """

    query_block: ClassVar[int] = 256
    key_block: ClassVar[int] = 512

    def __init__(self) -> None:
        self._xp: Any = None

    @property
    def xp(self) -> Any:
        """The array-API namespace, by array-api-compat; imported at first use."""
        if self._xp is None:
            library = importlib.import_module(self.info.library)
            try:
                self._xp = importlib.import_module(f"array_api_compat.{self.info.library}")
            except ModuleNotFoundError:
                self._xp = library
        return self._xp

    def refusals(self, request: Request) -> list[str]:
        """Say why the backend cannot run a call, see `Backend.refusals`."""
        reasons = super().refusals(request)
        if request.vjp and self.info.support("autodiff") != "full":
            reasons += _missing_pullbacks(request)
        return reasons

    def versions(self) -> dict[str, str]:
        """Give the array library's version."""
        return {self.info.library: importlib.import_module(self.info.library).__version__}

    def exchange(self, array: Any, device: str | None = None) -> Any:
        """Take an array of another library by DLPack."""
        return self.xp.from_dlpack(array)

    # The steps that a plugin may replace.

    def pool(self, x: Any, weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Pool keys or values, see `pdcore.heads.pool`."""
        return heads.pool(x, weights, xp=self.xp)

    def statistics(self, summary: Summary, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute a finalised state of the keys (*B, H, M, D), mask (*B, 1, M, 1) or None."""
        xp, stats = self.xp, summary.statistics
        if summary.scope == "prefix":
            return stats.finalize(prefix_states(stats, keys, mask, xp=xp), xp=xp)
        final: Mapping[str, Any] | None = None
        for _ in range(stats.rounds):
            state = stats.of(keys, mask, xp=xp, previous=final)
            if summary.scope == "batch":
                for axis in range(keys.ndim - 3):
                    state = reduce_axis(stats, state, axis, xp=xp)
            final = stats.finalize(state, xp=xp)
        assert final is not None
        return final

    def groups(self, plan: Plan, inputs: Inputs) -> tuple[Group, ...]:
        """Give the head groups to run; a backend may split them, since heads do not mix."""
        return plan.groups

    def each(
        self, function: Callable[[Group], Any], groups: tuple[Group, ...]
    ) -> list[Any]:
        """Run a function on every head group; a backend may do so in parallel."""
        return [function(group) for group in groups]

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores, see `pdcore.score_contraction.scores`."""
        return score_contraction.scores(
            c, o, xp=self.xp, query_block=self.query_block, key_block=self.key_block
        )

    def scores_vjp(self, c: Scores, o: Operands, out: Any, level: Any, d_out: Any,
                   d_level: Any) -> dict[str, Any]:  # fmt: skip
        """Pull back, see `pdcore.score_contraction.scores_vjp`."""
        return score_contraction.scores_vjp(
            c, o, out, level, d_out, d_level,
            xp=self.xp, query_block=self.query_block, key_block=self.key_block,
        )  # fmt: skip

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, see `pdcore.feature_contraction.features`."""
        return feature_contraction.features(c, o, xp=self.xp)

    def features_vjp(self, c: Features, o: Operands, out: Any, level: Any, d_out: Any,
                     d_level: Any) -> dict[str, Any]:  # fmt: skip
        """Pull back, see `pdcore.feature_contraction.features_vjp`."""
        return feature_contraction.features_vjp(c, o, out, level, d_out, d_level, xp=self.xp)

    # Running a plan.

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan, see `Backend.attention`."""
        call = _Call(self, plan, inputs)
        runs = self.each(lambda group: self._run(call, group), call.groups)
        out = call.join([run.out for run in runs], call.dtype)
        return out, call.join([run.lse for run in runs], call.accumulate) if lse else None

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and give its pullback, see `Backend.attention_vjp`."""
        call = _Call(self, plan, inputs)
        runs = self.each(lambda group: self._run(call, group, vjp=True), call.groups)
        out = call.join([run.out for run in runs], call.dtype)
        lse = call.join([run.lse for run in runs], call.accumulate)

        def vjp(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            return call.pull_back(self, [run.vjp for run in runs], d_out, d_lse)

        return out, lse, vjp

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights of a plan, see `Backend.attention_weights`."""
        call = _Call(self, plan, inputs)
        return call.join([self._run(call, g).weights() for g in call.groups], call.dtype)

    def _run(self, call: _Call, group: Group, *, vjp: bool = False) -> _GroupRun:
        """Take one head group through the plan."""
        xp, plan = self.xp, call.plan
        q, k, v = (call.heads(x, group, -4 if x is call.q else -3) for x in (call.q, call.k, call.v))
        params, values = call.group_params(group)
        visibility, weights = call.visibility(group)
        pools = []
        if weights is not None:
            (k, pull_k), (v, pull_v) = self.pool(k, weights), self.pool(v, weights)
            pools = [pull_k, pull_v]
        real = visibility.key_mask
        summary, final, state = plan.summary, {}, {}
        if summary is not None:
            final = self.statistics(summary, k, None if real is None else real[..., None])
            state = _at_rows(final, visibility, q.shape, xp) if summary.scope == "prefix" else final
        flat = xp.reshape(q, (*q.shape[:-3], q.shape[-3] * q.shape[-2], q.shape[-1]))
        rows = Rows(flat, k, key_mask=real)
        pullbacks: list[Pullback] = []
        for transform in plan.transforms:
            rows, pullback = transform(rows, state, params, xp=xp)
            pullbacks.append(pullback)
        shape = q.shape[:-1]
        o = Operands(
            xp.reshape(rows.q, (*shape, rows.q.shape[-1])), rows.k, v, rows.key_bias,
            None if call.bias is None else call.heads(call.bias, group, -4), values, visibility,
        )  # fmt: skip
        constant = None if rows.row_constant is None else xp.reshape(rows.row_constant, shape)
        c = plan.contraction
        out, level = self.scores(c, o) if isinstance(c, Scores) else self.features(c, o)
        alive = None
        if summary is not None and summary.scope == "prefix":
            alive = xp.reshape(state["n"], shape) > 0
        finish = _Normaliser(plan, o, out, level, constant, alive, xp)

        def pull(d_out: Any, d_lse: Any) -> dict[str, Any]:
            d = finish.pull_back(d_out, d_lse)
            contract = self.scores_vjp if isinstance(c, Scores) else self.features_vjp
            grads = contract(c, o, out, level, d[0], d[1])  # type: ignore[arg-type]
            flat_shape = rows.row_constant.shape if constant is not None else None
            cotangent = Rows(
                xp.reshape(grads["q"], rows.q.shape), grads["k"], grads.get("key_bias"),
                None if constant is None else xp.reshape(d[1], flat_shape),
            )  # fmt: skip
            dstate: dict[str, Any] = {}
            dparams = {n: sum_to(grads[n], values[n].shape, xp=xp) for n in values}
            for pullback in reversed(pullbacks):
                before, ds, dp = pullback(cotangent)
                cotangent = before._replace(key_bias=None, row_constant=None)
                add_into(dstate, ds)
                add_into(dparams, dp)
            dk, dv = cotangent.k, grads["v"]
            if dstate:
                assert summary is not None
                dk = dk + _statistics_vjp(summary, k, real, final, dstate, visibility, q.shape, xp)
            if pools:
                dk, dv = pools[0](dk), pools[1](dv)
            return {"q": xp.reshape(cotangent.q, q.shape), "k": dk, "v": dv,
                    **({"bias": grads["bias"]} if o.bias is not None else {}), **dparams}  # fmt: skip

        return _GroupRun(*finish.result(), pull if vjp else None,
                         lambda: finish.weights(c, weights, self))  # fmt: skip


def _missing_pullbacks(request: Request) -> list[str]:
    kernel, normalization = request.spec.kernel, request.spec.normalization
    reasons = []
    if isinstance(kernel, FeatureMap) and not kernel.has_vjp:
        reasons.append(f"{FEATURES['vjp']}: {kernel.word} has no features_vjp")
    if not isinstance(normalization, Identity) and not normalization.has_vjp:
        reasons.append(f"{FEATURES['vjp']}: {normalization.word} has no apply_vjp")
    return reasons


def _at_rows(final: Mapping[str, Any], visibility: Visibility, shape: tuple[int, ...],
             xp: Any) -> dict[str, Any]:  # fmt: skip
    """Read each query row's own prefix state, (*B, H, G N, D)."""
    counts = visibility.prefix_counts(0, visibility.rows)
    lead = (*shape[:-3], shape[-3] * shape[-2])
    state = {}
    for name, value in final.items():
        if visibility.static:
            picked = xp.take(value, counts[:, 0], axis=-2)
        else:
            index = xp.broadcast_to(counts[..., 0, :, :],
                                    (*value.shape[:-2], shape[-2], value.shape[-1]))  # fmt: skip
            picked = xp.take_along_axis(value, index, axis=-2)
        spread = xp.broadcast_to(picked[..., None, :, :], (*shape[:-1], picked.shape[-1]))
        state[name] = xp.reshape(spread, (*lead, picked.shape[-1]))
    return state


def _statistics_vjp(summary: Summary, keys: Any, real: Any, final: Mapping[str, Any],
                    dstate: Mapping[str, Any], visibility: Visibility, shape: tuple[int, ...],
                    xp: Any) -> Any:  # fmt: skip
    mask = None if real is None else real[..., None]
    if summary.scope != "prefix":
        return summary.statistics.vjp(keys, mask, final, dstate, xp=xp)
    assert isinstance(summary.statistics, Moments)
    rows = {n: xp.sum(xp.reshape(d, (*shape[:-1], d.shape[-1])), axis=-3)
            for n, d in dstate.items()}  # fmt: skip
    state = _at_rows(final, visibility, (*shape[:-3], 1, *shape[-2:]), xp)
    return summary.statistics.prefix_vjp(keys, mask, state, rows, visibility.later_rows(), xp=xp)


class _Call:
    """The arrays of a call in the accumulation dtype, with heads grouped."""

    def __init__(self, backend: ArrayBackend, plan: Plan, inputs: Inputs) -> None:
        xp = self.xp = backend.xp
        self.plan, self.inputs = plan, inputs
        self.groups = backend.groups(plan, inputs)
        q, k, v = inputs.q, inputs.k, inputs.v
        self.dtype = q.dtype
        self.accumulate = accumulation(q, xp)
        self.lead = len(q.shape) - 3
        self.key_heads = k.shape[-3]
        self.grouped = (*q.shape[:-3], self.key_heads, q.shape[-3] // self.key_heads)
        self.device = q.device
        if inputs.key_mask is not None:
            # Whatever stands in padding must not enter a product, nor a gradient.
            kept = inputs.key_mask[..., None, :, None]
            k, v = (xp.where(kept, x, xp.zeros_like(x)) for x in (k, v))
        self.q = xp.reshape(self.cast(q), (*self.grouped, *q.shape[-2:]))
        self.k, self.v = self.cast(k), self.cast(v)
        self.mask = self._ranked(inputs.mask)
        self.bias = None if inputs.bias is None else self._ranked(self.cast(inputs.bias))
        self.offset = self._offset()

    def cast(self, x: Any) -> Any:
        """Bring an array to the accumulation dtype."""
        return x if x.dtype == self.accumulate else self.xp.astype(x, self.accumulate)

    def _ranked(self, x: Any) -> Any:
        """Give a mask or bias all axes, (*B, H, G, N, M), each whole or of length 1."""
        if x is None:
            return None
        shape = (1,) * (self.lead + 3 - x.ndim) + tuple(x.shape)
        heads_ = self.grouped[-2:] if shape[-3] != 1 else (1, 1)
        return self.xp.reshape(x, (*shape[:-3], *heads_, *shape[-2:]))

    def _offset(self) -> Any:
        xp, offset = self.xp, self.inputs.offset
        rows, length = self.q.shape[-2], self.k.shape[-2]
        if isinstance(offset, int):
            return offset
        if isinstance(offset, str):  # "end"
            if self.inputs.key_mask is None:
                return length - rows
            index = xp.arange(1, length + 1, dtype=xp.int64, device=self.device)
            real = xp.where(self.inputs.key_mask, index, xp.zeros_like(index))
            end = xp.max(real, axis=-1) if length else xp.sum(real, axis=-1)
            offset = end - rows
        return xp.astype(offset, xp.int64)[..., None, None, None, None]

    def heads(self, x: Any, group: Group, axis: int) -> Any:
        """Cut the key heads of a group; a view where they are consecutive."""
        return cut_heads(x, group.heads, axis, self.xp)

    def group_params(self, group: Group) -> tuple[dict[str, Any], dict[str, Any]]:
        """Give the parameters of a group: for transforms, and for the log kappa expression."""
        xp, spec = self.xp, self.plan.spec
        shaped = {}
        for name, x in self.inputs.params.items():
            x = self.cast(cut_heads(x, group.heads, 0, xp))
            if x.ndim <= 2:
                x = xp.reshape(x, (x.shape[0], 1, *(x.shape[1:] or (1,))))
            shaped[name] = x
        pointwise = isinstance(spec.kernel, PointwiseKernel)
        own = {p.name for p in spec.kernel.parameters()} if pointwise else set()
        return shaped, {n: shaped[n][..., None] for n in shaped if n in own}

    def visibility(self, group: Group) -> tuple[Visibility, Any]:
        """Give the support of a group, and the pooling weights if it pools."""
        xp, scale = self.xp, group.scale
        real = self.inputs.key_mask
        key_mask = None if real is None else real[..., None, :]
        weights = None
        if scale > 1:
            weights = heads.pooling_weights(
                self.k.shape[-2], key_mask, scale, self.plan.pool, self.k, xp=xp
            )
            key_mask = None if real is None else xp.any(weights > 0, axis=-1)
        mask = self.mask
        if mask is not None:
            mask = cut_heads(mask, group.heads, -4, xp)
        return Visibility(
            self.plan.spec.support, xp, self.q.shape[-2], self.k.shape[-2], scale, self.offset,
            key_mask, real, mask, self.device,
        ), weights  # fmt: skip

    def join(self, parts: list[Any], dtype: Any) -> Any:
        """Put head groups back in order and query heads on one axis."""
        xp = self.xp
        axis = self.lead
        x = _ordered(parts, self.groups, axis, xp)
        shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
        x = xp.reshape(x, shape)
        return x if x.dtype == dtype else xp.astype(x, dtype)

    def pull_back(
        self, backend: ArrayBackend, vjps: list[Any], d_out: Any, d_lse: Any
    ) -> dict[str, Any]:
        """Take cotangents of the results through every group to all inputs."""
        xp, inputs = self.xp, self.inputs
        d_out = xp.reshape(self.cast(d_out), (*self.grouped, *d_out.shape[-2:]))
        if d_lse is None:
            d_lse = xp.zeros_like(d_out[..., 0]) if d_out.shape[-1] else xp.sum(d_out, axis=-1)
        else:
            d_lse = xp.reshape(self.cast(d_lse), (*self.grouped, d_lse.shape[-1]))
        axis = self.lead
        pulls = dict(zip(self.groups, vjps, strict=True))
        grads = backend.each(
            lambda g: pulls[g](self.heads(d_out, g, axis), self.heads(d_lse, g, axis)), self.groups
        )
        joined = {
            n: _ordered([g[n] for g in grads], self.groups, axis, xp) for n in ("q", "k", "v")
        }
        result = {
            "q": xp.astype(xp.reshape(joined["q"], inputs.q.shape), self.dtype),
            "k": xp.astype(joined["k"], self.dtype),
            "v": xp.astype(joined["v"], self.dtype),
        }
        if inputs.key_mask is not None:
            kept = inputs.key_mask[..., None, :, None]
            for name in ("k", "v"):
                result[name] = xp.where(kept, result[name], xp.zeros_like(result[name]))
        if self.bias is not None:
            parts = [g["bias"] for g in grads]
            whole = self.bias.shape[-4] != 1
            # A bias shared by all heads collects from every group.
            total = _ordered(parts, self.groups, axis, xp) if whole else _added(parts)
            result["bias"] = xp.astype(xp.reshape(total, inputs.bias.shape), inputs.bias.dtype)
        for name, x in inputs.params.items():
            parts = [g.get(name) for g in grads]
            if any(p is None for p in parts):
                result[name] = xp.zeros_like(x)  # running statistics are constants of the call
                continue
            total = _ordered(parts, self.groups, 0, xp)
            result[name] = xp.astype(xp.reshape(total, x.shape), x.dtype)
        return result


def accumulation(x: Any, xp: Any) -> Any:
    """Give the dtype of sums: float32 for 16 bit, the array's own otherwise."""
    return xp.float32 if dtype_name(x) in ("float16", "bfloat16") else x.dtype


def cut_heads(x: Any, chosen: tuple[int, ...], axis: int, xp: Any) -> Any:
    """Take heads along an axis that may be broadcast; a view where they are consecutive."""
    if x.shape[axis] == 1 or chosen == tuple(range(x.shape[axis])):
        return x
    if chosen == tuple(range(chosen[0], chosen[-1] + 1)):
        index: list[Any] = [slice(None)] * x.ndim
        index[axis] = slice(chosen[0], chosen[-1] + 1)
        return x[tuple(index)]
    return xp.take(x, xp.asarray(chosen, dtype=xp.int64, device=x.device), axis=axis % x.ndim)


def _ordered(parts: list[Any], groups: tuple[Group, ...], axis: int, xp: Any) -> Any:
    if len(parts) == 1:
        return parts[0]
    heads_ = [h for g in groups for h in g.heads]
    x = xp.concat(parts, axis=axis)
    if heads_ == sorted(heads_):
        return x
    back = sorted(range(len(heads_)), key=heads_.__getitem__)
    return xp.take(x, xp.asarray(back, dtype=xp.int64, device=x.device), axis=axis)


def _added(parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class _Normaliser:
    """From (out, L) of a contraction to the result and its log-sum-exp, by h."""

    def __init__(self, plan: Plan, o: Operands, out: Any, level: Any, constant: Any, alive: Any,
                 xp: Any) -> None:  # fmt: skip
        self.h, self.signed = plan.normaliser, plan.contraction.signed
        self.o, self.xp, self.alive = o, xp, alive
        self.out, self.inner = out, level
        if alive is not None:
            level = xp.where(alive, level, xp.full_like(level, -xp.inf))
        # L of an empty row stays -inf whatever the row constant is.
        self.level = level if constant is None else xp.where(
            level == -xp.inf, level, level + constant)  # fmt: skip
        self.factor: Any = None
        if self.h == "sum":
            return
        counts = o.visibility.counts(o.bias)
        if alive is not None:
            counts = xp.where(alive, counts, xp.zeros_like(counts))
        counts = xp.broadcast_to(counts, level.shape)
        self.seen = counts > 0
        count = xp.astype(xp.where(self.seen, counts, xp.ones_like(counts)), level.dtype)
        self.log_h = xp.log(count) if self.h == "count" else xp.zeros_like(count)
        self.factor = xp.exp(self.level - self.log_h)

    def result(self) -> tuple[Any, Any]:
        """Give (out, lse)."""
        xp, out = self.xp, self.out
        if self.factor is not None:
            out = out * self.factor[..., None]
        if self.alive is not None:
            out = xp.where(self.alive[..., None], out, xp.zeros_like(out))
        if self.factor is None:
            return out, self.level
        return out, xp.where(self.seen, self.log_h, xp.full_like(self.log_h, -xp.inf))

    def pull_back(self, d_out: Any, d_lse: Any) -> tuple[Any, Any]:
        """Give the cotangents of the contraction's (out, L)."""
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

    def weights(self, c: Scores | Features, pooling: Any, backend: ArrayBackend) -> Any:
        """Compute kappa / h for every query and every key of the call."""
        xp, o = self.xp, self.o
        if isinstance(c, Features):
            c = Scores("log_features" if c.log else "features", signed=c.signed)
        w = score_contraction.weights(c, o, self.inner, xp=xp, query_block=backend.query_block)
        if self.factor is not None:
            w = w * self.factor[..., None]
        if self.alive is not None:
            w = xp.where(self.alive[..., None], w, xp.zeros_like(w))
        if pooling is None:
            return w
        spread = w[..., None] * pooling[..., None, None, :, :]
        *lead, count, scale = spread.shape
        return xp.reshape(spread, (*lead, count * scale))[..., : o.visibility.length]
