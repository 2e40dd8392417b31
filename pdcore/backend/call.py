"""A call on its way through `ArrayBackend`: its arrays by head group, and its normaliser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arrays import device_of, dtype_name
from ..lowering import Features, Group, Plan, Scores
from ..spec import Batch, PointwiseKernel, Visibility, heads
from . import score_contraction
from .contract import Inputs
from .operands import Operands

__all__ = ["Call", "Normaliser", "constants_held", "spacing"]


class Call:
    """The arrays of a call in their own dtype, with heads grouped.

    Attributes
    ----------
    native : frozenset of str
        The steps that read them as they are, see `ArrayBackend.native`; others get a cast.
    """

    def __init__(self, backend: Any, plan: Plan, inputs: Inputs) -> None:
        xp = self.xp = backend.xp
        self.plan, self.inputs = plan, inputs
        self.native: frozenset[str] = backend.native(plan)
        q, k, v = inputs.q, inputs.k, inputs.v
        self.dtype = q.dtype
        self.accumulate = accumulation(q, xp)
        self.lead = len(q.shape) - 3
        self.key_heads = k.shape[-3]
        self.grouped = (*q.shape[:-3], self.key_heads, q.shape[-3] // self.key_heads)
        self.device = device_of(q)
        if inputs.key_mask is not None:
            # Whatever stands in padding must not enter a product, nor a gradient.
            k, v = self._kept(k), self._kept(v)
        self.q = xp.reshape(q, (*self.grouped, *q.shape[-2:]))
        self.k, self.v = k, v
        self.mask = self._ranked(inputs.mask)
        self.bias = self._ranked(inputs.bias)
        self.offset = self._offset()

    def cast(self, x: Any) -> Any:
        """Bring an array to the accumulation dtype."""
        return self._as(x, self.accumulate)

    def taken(self, step: str, x: Any) -> Any:
        """Bring an array to the dtype in which a step takes it."""
        return x if step in self.native else self.cast(x)

    def _kept(self, x: Any) -> Any:
        """Put zeros where keys are padding, in the array's dtype: CuPy has no bfloat16 `where`."""
        kept = self.inputs.key_mask[..., None, :, None]
        return self._as(self.xp.where(kept, x, self.xp.zeros_like(x)), x.dtype)

    def _as(self, x: Any, dtype: Any) -> Any:
        return x if x.dtype == dtype else self.xp.astype(x, dtype)

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
            like = self.cast(self.k[..., :0])
            weights = heads.pooling_weights(
                self.k.shape[-2], key_mask, scale, self.plan.pool, like, xp=xp
            )
            key_mask = None if real is None else xp.any(weights > 0, axis=-1)
        mask = self.mask
        if mask is not None:
            mask = cut_heads(mask, group.heads, -4, xp)
        return Visibility(
            self.plan.spec.support,
            xp,
            self.q.shape[-2],
            self.k.shape[-2],
            scale,
            self.offset,
            key_mask,
            real,
            mask,
            self.device,
        ), weights

    def join(self, parts: list[Any], dtype: Any, whole: Any = None) -> Any:
        """Put head groups back in order and query heads on one axis; `whole` is in order."""
        xp = self.xp
        axis = self.lead
        x = _ordered(parts, self.plan.groups, axis, xp) if whole is None else whole
        shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
        return self._as(xp.reshape(x, shape), dtype)

    def pull_back(self, vjps: list[Any], d_out: Any, d_lse: Any) -> dict[str, Any]:
        """Take cotangents of the results through every group to all inputs."""
        xp, inputs = self.xp, self.inputs
        d_out = xp.reshape(d_out, (*self.grouped, *d_out.shape[-2:]))
        if d_lse is None:
            one = d_out[..., 0] if d_out.shape[-1] else xp.sum(d_out, axis=-1)
            d_lse = xp.zeros_like(self.cast(one))
        else:
            d_lse = xp.reshape(self.cast(d_lse), (*self.grouped, d_lse.shape[-1]))
        axis = self.lead
        grads = [
            vjp(self.heads(d_out, g, axis), self.heads(d_lse, g, axis))
            for vjp, g in zip(vjps, self.plan.groups, strict=True)
        ]
        joined = {
            n: _ordered([g[n] for g in grads], self.plan.groups, axis, xp) for n in ("q", "k", "v")
        }
        result = {
            "q": self._as(xp.reshape(joined["q"], inputs.q.shape), self.dtype),
            "k": self._as(joined["k"], self.dtype),
            "v": self._as(joined["v"], self.dtype),
        }
        if inputs.key_mask is not None:
            result |= {name: self._kept(result[name]) for name in ("k", "v")}
        if self.bias is not None:
            parts = [g["bias"] for g in grads]
            whole = self.bias.shape[-4] != 1
            # A bias shared by all heads collects from every group.
            total = _ordered(parts, self.plan.groups, axis, xp) if whole else _added(parts)
            result["bias"] = self._as(xp.reshape(total, inputs.bias.shape), inputs.bias.dtype)
        for name, x in inputs.params.items():
            parts = [g.get(name) for g in grads]
            if any(p is None for p in parts):
                result[name] = xp.zeros_like(x)  # running statistics are constants of the call
                continue
            total = _ordered(parts, self.plan.groups, 0, xp)
            result[name] = self._as(xp.reshape(total, x.shape), x.dtype)
        return result


def accumulation(x: Any, xp: Any) -> Any:
    """Give the dtype of sums: float32 for 16 bit, the array's own otherwise."""
    return xp.float32 if dtype_name(x) in ("float16", "bfloat16") else x.dtype


def constants_held(plan: Plan, inputs: Inputs, stop: Callable[[Any], Any]) -> Inputs:
    """Let `stop` cut the gradients of running statistics, which are constants of a call."""
    normalization = plan.spec.normalization
    if not isinstance(normalization, Batch) or normalization.statistics != "running":
        return inputs
    held = {name: stop(inputs.params[name]) for name in ("mean", "var")}
    return inputs._replace(params={**inputs.params, **held})


def cut_heads(x: Any, chosen: tuple[int, ...], axis: int, xp: Any) -> Any:
    """Take heads along an axis that may be broadcast; a view where they are consecutive."""
    if x.shape[axis] == 1 or chosen == tuple(range(x.shape[axis])):
        return x
    if chosen == tuple(range(chosen[0], chosen[-1] + 1)):
        index: list[Any] = [slice(None)] * x.ndim
        index[axis] = slice(chosen[0], chosen[-1] + 1)
        return x[tuple(index)]
    return xp.take(x, xp.asarray(chosen, dtype=xp.int64, device=device_of(x)), axis=axis % x.ndim)


def spacing(chosen: tuple[int, ...]) -> int | None:
    """Give how far apart the chosen heads are, if that is the same for all."""
    step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    return step if chosen == tuple(range(chosen[0], chosen[-1] + 1, step)) else None


def _ordered(parts: list[Any], groups: tuple[Group, ...], axis: int, xp: Any) -> Any:
    if len(parts) == 1:
        return parts[0]
    heads_ = [h for g in groups for h in g.heads]
    x = xp.concat(parts, axis=axis)
    if heads_ == sorted(heads_):
        return x
    back = sorted(range(len(heads_)), key=heads_.__getitem__)
    return xp.take(x, xp.asarray(back, dtype=xp.int64, device=device_of(x)), axis=axis)


def _added(parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class Normaliser:
    """From (out, L) of a contraction to the result and its log-sum-exp, by h."""

    def __init__(
        self, plan: Plan, o: Operands, out: Any, level: Any, constant: Any, alive: Any, xp: Any
    ) -> None:
        self.h, self.signed = plan.normaliser, plan.contraction.signed
        self.o, self.xp, self.alive = o, xp, alive
        self.out, self.inner = out, level
        if alive is not None:
            level = xp.where(alive, level, xp.full_like(level, -xp.inf))
        # L of an empty row stays -inf whatever the row constant is.
        self.level = (
            level if constant is None else xp.where(level == -xp.inf, level, level + constant)
        )
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

    @property
    def plain(self) -> bool:
        """Whether the contraction's `out` is the result, and ``d_out`` its cotangent."""
        return self.factor is None and self.alive is None

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

    def weights(self, c: Scores | Features, pooling: Any, backend: Any) -> Any:
        """Compute kappa / h for every query and every key of the call."""
        xp, o = self.xp, self.o
        if isinstance(c, Features):
            if c.raw:
                q, k = (c.kernel.features(x, xp=xp, params={}) for x in (o.q, o.k))
                o = o._replace(q=q, k=k)
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
