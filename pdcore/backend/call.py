"""The arrays of a call in `ArrayBackend`: cut into head groups, and joined again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..arrays import device_of, dtype_name
from ..lowering import Group, Plan
from ..spec import Visibility
from .contract import Inputs
from .dropout import Dropout, row_lanes, seed_words
from .operands import Carried

__all__ = ["Call", "accumulation", "constants_held", "cut_heads", "spacing"]


class Call:
    """The arrays of a call in the caller's dtype, with query heads grouped by key head.

    Attributes
    ----------
    several : bool
        Whether there is more than one head group.
    level : bool
        Whether L is read: for the log-sum-exp, a normaliser that rescales, or a pullback.
    native : frozenset of str
        The steps that read arrays without a cast, see `ArrayBackend.native`.
    carried : mapping of Group to Carried, or None
        What a decoder carries for each head group, see `ArrayBackend.decode`.
    """

    carried: Mapping[Group, Carried] | None = None

    def __init__(self, backend: Any, plan: Plan, inputs: Inputs, *, level: bool = True) -> None:
        xp = self.xp = backend.xp
        self.plan, self.inputs, self.level = plan, inputs, level
        self.native: frozenset[str] = backend.native(plan)
        q, k, v = inputs.q, inputs.k, inputs.v
        *lead, heads, rows, dim = q.shape
        self.dtype = q.dtype
        self.accumulate = accumulation(q, xp)
        self.lead = len(lead)
        self.several = len(plan.groups) > 1
        self.key_heads = k.shape[-3]
        self.grouped = (*lead, self.key_heads, heads // self.key_heads)
        self.device = getattr(q, "device", None)  # see `arrays.device_of`
        if inputs.key_mask is not None:
            # Padding may hold NaN, which must enter no product and no gradient.
            k, v = self._zero_padding(k), self._zero_padding(v)
        self.q = xp.reshape(q, (*self.grouped, rows, dim))
        self.k, self.v = k, v
        real = inputs.key_mask
        self.key_mask = None if real is None else real[..., None, :]
        self.mask = None if inputs.mask is None else self._with_all_axes(inputs.mask)
        self.bias = None if inputs.bias is None else self._with_all_axes(inputs.bias)
        self.offset = inputs.offset if isinstance(inputs.offset, int) else self._offset()
        labels = inputs.labels
        if labels is not None:
            pair = labels if isinstance(labels, tuple | list) else (labels, labels)
            labels = tuple(x[..., None, None, :] for x in pair)
        self.labels = labels
        self.lanes = self._lanes(backend) if inputs.dropout else ()

    def cast(self, x: Any) -> Any:
        """Cast an array to the accumulation dtype."""
        return self._as(x, self.accumulate)

    def read_by(self, step: str, x: Any) -> Any:
        """Cast an array to the dtype in which a step reads it."""
        if step in self.native or x.dtype == self.accumulate:
            return x
        return self.xp.astype(x, self.accumulate)

    def _zero_padding(self, x: Any) -> Any:
        """Set padding to 0; with a cast back to bfloat16, which `where` of CuPy does not keep."""
        kept = self.inputs.key_mask[..., None, :, None]
        return self._as(self.xp.where(kept, x, self.xp.zeros_like(x)), x.dtype)

    def _as(self, x: Any, dtype: Any) -> Any:
        return x if x.dtype == dtype else self.xp.astype(x, dtype)

    def _with_all_axes(self, x: Any) -> Any:
        """Return a mask or bias with all axes, (*B, H, G, N, M), each whole or of length 1."""
        shape = (1,) * (self.lead + 3 - x.ndim) + tuple(x.shape)
        heads_ = self.grouped[-2:] if shape[-3] != 1 else (1, 1)
        return self.xp.reshape(x, (*shape[:-3], *heads_, *shape[-2:]))

    def _offset(self) -> Any:
        """Return the position of query 0 for an offset that is not an int, see `Visibility`."""
        xp, offset = self.xp, self.inputs.offset
        rows, length = self.q.shape[-2], self.k.shape[-2]
        if isinstance(offset, str):  # "end"
            if self.inputs.key_mask is None:
                return length - rows
            index = xp.arange(1, length + 1, dtype=xp.int64, device=self.device)
            real = xp.where(self.inputs.key_mask, index, xp.zeros_like(index))
            end = xp.max(real, axis=-1) if length else xp.sum(real, axis=-1)
            offset = end - rows
        unsigned = dtype_name(offset).startswith("uint")
        offset = xp.astype(offset, xp.int64)
        low, high = self.plan.support.offsets(
            rows, length, max(group.scale for group in self.plan.groups)
        )
        # Not nearer to 0 than this, because shards add the positions of other shards.
        low, high = min(low, -(2**30)), max(high, 2**30)
        ends = xp.full_like(offset, low), xp.full_like(offset, high)
        if unsigned:  # the cast has wrapped numbers that int64 does not hold
            offset = xp.where(offset < 0, ends[1], offset)
        # Offsets near the ends of int64 must not wrap when rows and windows are added.
        offset = xp.minimum(xp.maximum(offset, ends[0]), ends[1])
        return offset[..., None, None, None, None]

    def _lanes(self, backend: Any) -> tuple[Any, Any]:
        """Return the words of every row of weights, (*B, H, G, N), see `.dropout`."""
        xp, seed = self.xp, self.inputs.seed
        dtype = getattr(xp, backend.words)
        rows = self.row_indices(dtype)
        count = math.prod(self.grouped)
        heads = xp.reshape(xp.arange(count, dtype=dtype, device=self.device), (*self.grouped, 1))
        seed = backend.drawn_seed(self.q) if seed is None else seed
        return row_lanes(seed_words(seed, rows, xp=xp), heads, rows, xp=xp)

    def row_indices(self, dtype: Any) -> Any:
        """Return the indices of the queries, as dropout counts them."""
        return self.xp.arange(self.q.shape[-2], dtype=dtype, device=self.device)

    def dropout(self, group: Group) -> Dropout:
        """Return what drops the weights of a group."""
        first, second = (
            cut_heads(x, group.heads, -3, self.xp) if self.several else x for x in self.lanes
        )
        return Dropout(self.inputs.dropout, (first, second), group.scale)

    def params(self, group: Group) -> dict[str, Any]:
        """Return the parameters of a group, as its steps broadcast them.

        Those of key heads are (H, 1, 1) or (H, 1, D) if they have a head axis and at most one
        other; those of query heads (H, G, ...).
        """
        xp, shaped = self.xp, {}
        for name, x in self.inputs.params.items():
            if name in self.plan.by_query_head:
                heads = self.grouped[-2:] if x.shape[0] != 1 else (1, 1)
                x = xp.reshape(x, (*heads, *x.shape[1:]))
                shaped[name] = self.cast(cut_heads(x, group.heads, 0, xp))
                continue
            x = self.cast(cut_heads(x, group.heads, 0, xp) if self.several else x)
            if x.ndim <= 2:
                x = xp.reshape(x, (x.shape[0], 1, *(x.shape[1:] or (1,))))
            shaped[name] = x
        return shaped

    def visibility(self, group: Group, key_mask: Any) -> Visibility:
        """Return the visibility of a group's keys; `key_mask` (*B, 1, M) marks pooled keys."""
        if self.carried is not None:
            carried = self.carried[group]
            length, offset = carried.k.shape[-2] * group.scale, carried.offset
            if not isinstance(offset, int):
                offset = offset[..., None, None, None, None]
            known = (group.scale, offset, key_mask, None, None, self.device)
            return Visibility(self.plan.support, self.xp, self.q.shape[-2], length, *known)
        mask = self.mask
        if mask is not None and self.several:
            mask = cut_heads(mask, group.heads, -4, self.xp)
        return Visibility(
            self.plan.support,
            self.xp,
            self.q.shape[-2],
            self.k.shape[-2],
            group.scale,
            self.offset,
            key_mask,
            self.inputs.key_mask,
            mask,
            self.device,
            self.labels,
            self.inputs.segments,
        )

    def join(self, parts: list[Any], dtype: Any, whole: Any = None) -> Any:
        """Join head groups in the caller's order, query heads on one axis; `whole` is joined."""
        axis, xp = self.lead, self.xp
        if whole is not None:
            x = whole
        else:
            x = parts[0] if len(parts) == 1 else _join_groups(parts, self.plan, axis, xp)
        shape = tuple(x.shape)
        joined = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
        return self._as(xp.reshape(x, joined), dtype)

    def pull_back(
        self, pullbacks: list[Callable[[Any, Any], dict[str, Any]]], d_out: Any, d_lse: Any
    ) -> dict[str, Any]:
        """Pull cotangents of the results back to all inputs, through every group's pullback."""
        xp, inputs = self.xp, self.inputs
        d_out = xp.reshape(d_out, (*self.grouped, *d_out.shape[-2:]))
        if d_lse is None:
            one = d_out[..., 0] if d_out.shape[-1] else xp.sum(d_out, axis=-1)
            d_lse = xp.zeros_like(self.cast(one))
        else:
            d_lse = xp.reshape(self.cast(d_lse), (*self.grouped, d_lse.shape[-1]))
        axis = self.lead
        grads = [
            pullback(*(cut_heads(d, group.heads, axis, xp) for d in (d_out, d_lse)))
            for pullback, group in zip(pullbacks, self.plan.groups, strict=True)
        ]
        joined = {
            n: _join_groups([g[n] for g in grads], self.plan, axis, xp) for n in ("q", "k", "v")
        }
        result = {
            "q": self._as(xp.reshape(joined["q"], inputs.q.shape), self.dtype),
            "k": self._as(joined["k"], self.dtype),
            "v": self._as(joined["v"], self.dtype),
        }
        if inputs.key_mask is not None:
            result |= {name: self._zero_padding(result[name]) for name in ("k", "v")}
        if self.bias is not None:
            # A call with a bias pools no keys, so all of its heads are one group.
            [gradient] = [g["bias"] for g in grads]
            result["bias"] = self._as(xp.reshape(gradient, inputs.bias.shape), inputs.bias.dtype)
        for name, x in inputs.params.items():
            parts = [g.get(name) for g in grads]
            if any(p is None for p in parts):
                result[name] = xp.zeros_like(x)  # running statistics are constants of the call
                continue
            total = _join_groups(parts, self.plan, 0, xp)
            result[name] = self._as(xp.reshape(total, x.shape), x.dtype)
        return result


def accumulation(x: Any, xp: Any) -> Any:
    """Return the dtype of sums: float32 for 16 bits, the array's dtype otherwise."""
    return xp.float32 if dtype_name(x) in ("float16", "bfloat16") else x.dtype


def constants_held(plan: Plan, inputs: Inputs, stop: Callable[[Any], Any]) -> Inputs:
    """Return inputs whose constant parameters get no gradient; `stop` detaches an array."""
    if not plan.constants:
        return inputs
    constants = {name: stop(inputs.params[name]) for name in plan.constants}
    return inputs._replace(params={**inputs.params, **constants})


def cut_heads(x: Any, chosen: tuple[int, ...], axis: int, xp: Any) -> Any:
    """Return some heads along an axis that may be broadcast; a view if they are consecutive."""
    size, count = x.shape[axis], len(chosen)
    if size == 1:
        return x
    if chosen == tuple(range(chosen[0], chosen[0] + count)):
        if count == size:
            return x
        index: list[Any] = [slice(None)] * x.ndim
        index[axis] = slice(chosen[0], chosen[-1] + 1)
        return x[tuple(index)]
    return xp.take(x, xp.asarray(chosen, dtype=xp.int64, device=device_of(x)), axis=axis % x.ndim)


def spacing(chosen: tuple[int, ...]) -> int | None:
    """Return the step between the chosen heads; None if they are not evenly spaced."""
    step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    return step if chosen == tuple(range(chosen[0], chosen[-1] + 1, step)) else None


def _join_groups(parts: list[Any], plan: Plan, axis: int, xp: Any) -> Any:
    """Join arrays of head groups along an axis, heads in the caller's order."""
    if len(parts) == 1:
        return parts[0]
    pieces = parts
    if plan.runs:
        lead = (slice(None),) * axis
        pieces = [
            parts[group][(*lead, slice(start, stop), ...)] for group, start, stop in plan.runs
        ]
    return xp.concat(pieces, axis=axis)
