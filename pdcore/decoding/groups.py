"""What a decoder carries for the key heads of one scale, and how new keys advance it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..arrays import device_of
from ..backend import Carried, accumulation, cut_heads
from ..lowering import Features, Group, Plan, Rows
from ..spec import AttentionSpec, Convolution, Mean, Moments, convolve, pooling_weights
from .rows import (
    Place,
    below,
    kept,
    later,
    like,
    picked,
    place,
    rows_from,
    whole_div,
    written,
    zeroed,
)
from .statistics import (
    MOMENTS,
    SUMS,
    advance_moments,
    advance_sums,
    after_one,
    before_of,
    first_key,
    largest_of,
    row_states,
    shrink_of,
)

__all__ = ["HeadGroup", "Step"]

State = Mapping[str, Any]


class Step(NamedTuple):
    """The arguments of `Decoder.extend`, as every head group reads them.

    Attributes
    ----------
    backend : ArrayBackend
    plan : Plan
    k, v : array (*B, Hkv, N, D) and (*B, Hkv, N, Dv)
        New keys and values; zeros in padding.
    params : mapping of Group to mapping of str to array
        See `Call.params`.
    at, count : int or integer array (*B,)
        The lengths before the call, and how many of the N positions are real.
    real : bool array (*B, N) or None
        Which of them are real; None for all.
    longest : int or None
        The largest length after the call, where buffers are cut to it.
    in_place : bool
    """

    backend: Any
    plan: Plan
    k: Any
    v: Any
    params: Mapping[Group, Mapping[str, Any]]
    at: Place
    count: Place
    real: Any
    longest: int | None
    in_place: bool


@dataclass
class HeadGroup:
    """The state of the key heads of one scale.

    Attributes
    ----------
    group : Group
    pool : str
        How windows are pooled.
    left : int or inf
        How many positions before its own a query sees.
    taps : int
        The number of taps of a convolution; 0 without one.
    statistics : Mean or None
        The statistics of prefixes.
    features : bool
        Whether sums of features are carried in place of keys.
    logs : bool
        Whether features are logarithms.
    """

    group: Group
    pool: str
    left: float
    taps: int
    statistics: Mean | None
    features: bool
    logs: bool
    suffix: str = field(init=False)

    def __post_init__(self) -> None:
        self.suffix = f".{self.group.scale}"

    @staticmethod
    def of(spec: AttentionSpec, plan: Plan) -> list[HeadGroup]:
        """Return the groups of a plan; a convolution is in the spec alone."""
        t = spec.normalization
        taps = t.taps[0] if isinstance(t, Convolution) else 0
        statistics = plan.summary.statistics if plan.summary is not None else None
        assert statistics is None or isinstance(statistics, Mean)
        features = isinstance(plan.contraction, Features)
        logs = isinstance(plan.contraction, Features) and plan.contraction.log
        known = (plan.pool, plan.support.left, taps, statistics, features, logs)
        return [HeadGroup(group, *known) for group in plan.groups]

    @property
    def scale(self) -> int:
        """The number of positions of a key."""
        return self.group.scale

    @property
    def remembers(self) -> bool:
        """Whether the group carries what a truncation cannot cut: all but keys and values."""
        return self.scale > 1 or self.taps > 1 or self.features or self.statistics is not None

    def window(self, undo: int, capacity: int | None) -> int | None:
        """Return how many keys a window needs; None where all keys are kept."""
        if self.left == math.inf:
            return None
        needed = int(self.left) // self.scale + -(-undo // self.scale)
        return needed if capacity is None or needed < capacity // self.scale else None

    def zero(
        self, plan: Plan, params: State, k: Any, v: Any, capacity: int | None, undo: int, xp: Any
    ) -> dict[str, Any]:
        """Return the state of no keys, for keys and values like k (*B, Hkv, 0, D) and v."""
        wide, more = accumulation(k, xp), -(-undo // self.scale)

        def rows(x: Any, count: int, dtype: Any = wide, dim: int | None = None) -> Any:
            shape = (
                *x.shape[:-3],
                len(self.group.heads),
                count,
                x.shape[-1] if dim is None else dim,
            )
            return xp.zeros(shape, dtype=dtype, device=device_of(k))

        state: dict[str, Any] = {}
        narrow = k.dtype
        if self.scale > 1:
            state["open_keys"] = rows(k, self.scale - 1 + undo, narrow)
            state["open_values"] = rows(v, self.scale - 1 + undo, narrow)
        pooled = narrow if self.scale == 1 else wide
        if self.taps > 1:
            state["taps"] = rows(k, self.taps - 1 + more, pooled)
        if self.statistics is not None:
            state["first"] = rows(k, 1)
            names = MOMENTS if isinstance(self.statistics, Moments) else MOMENTS[:3]
            state |= {name: rows(k, undo + 1, dim=1 if name == "n" else None) for name in names}
        if self.features:
            count = _features(plan, rows(k, 1), params, xp).shape[-1]
            shape = (*k.shape[:-3], len(self.group.heads), undo + 1, count, v.shape[-1] + 1)
            for name in ("sums", "sums_low"):
                state[name] = xp.zeros(shape, dtype=wide, device=device_of(k))
            state["top"] = rows(k, undo + 1, dim=count if self.logs else 1) - math.inf
        else:
            window = self.window(undo, capacity)
            ring = "" if window is None else "last_"
            size = capacity // self.scale if window is None and capacity is not None else window
            assert size is not None
            final = wide if self.taps or self.statistics is not None else pooled
            state[f"{ring}keys"] = rows(k, size, final)
            state[f"{ring}values"] = rows(v, size, pooled)
        return {name + self.suffix: x for name, x in state.items()}

    def part(self, state: State) -> dict[str, Any]:
        """Return the entries of this group, by their names without the scale."""
        end = self.suffix
        return {n.removesuffix(end): x for n, x in state.items() if n.endswith(end)}

    def advance(self, step: Step, state: State) -> tuple[Carried, Callable[[Any], dict[str, Any]]]:
        """Return what a call reads, and a function of its operands to the next state."""
        own, xp = self.part(state), step.backend.xp
        cast = _caster(step, xp)
        k, v = (cut_heads(x, self.group.heads, -3, xp) for x in (step.k, step.v))
        new: dict[str, Any] = {}
        phase = 0 if self.scale == 1 else step.at % self.scale
        first, count = whole_div(step.at, self.scale), whole_div(phase + step.count, self.scale)
        real = step.real
        if self.scale > 1:
            k, v, real = self._pooled(step, own, k, v, phase, count, new, cast)
        if self.taps:
            k = self._convolved(step, own, k, count, new, cast)
        state_rows: State = {}
        points: dict[str, Any] = {}
        if self.statistics is not None:
            wide = cast(k)
            points["first"] = first_key(own["first"], wide, first, count, xp)
            k = wide - points["first"]  # keys never move, so nothing stored is written again
            state_rows = self._statistics(step, own, k, points["first"], phase, real, new)
        if self.features:
            params = step.params[self.group]
            points |= largest_of(step.plan, cast(k), real, params, own, xp)
            shrink = shrink_of(step.plan, own, points, xp)
            before = before_of(step.plan, own, shrink, xp)
            carried = Carried(k, v, real, phase, state_rows, points, before)
        else:
            stored = self._stored(step, own, k, v, first, count, phase, new)
            carried = Carried(*stored, state_rows, points)

        def complete(operands: Any) -> dict[str, Any]:
            if self.features:
                old = {name: own[name] for name in SUMS}
                undo = own["top"].shape[-2] - 1
                ends = [
                    whole_div(phase + step.count - undo + i, self.scale) for i in range(undo + 1)
                ]
                new.update(advance_sums(step, old, points, shrink, operands, ends))
            return {name + self.suffix: x for name, x in {**own, **new}.items()}

        return carried, complete

    def _pooled(
        self,
        step: Step,
        own: State,
        k: Any,
        v: Any,
        phase: Place,
        count: Place,
        new: dict[str, Any],
        cast: Any,
    ) -> tuple[Any, Any, Any]:
        """Return the pooled keys and values of windows that the new positions fill."""
        xp, s, rows = step.backend.xp, self.scale, k.shape[-2]
        windows = ((phase if isinstance(phase, int) else s - 1) + rows) // s
        weights = pooling_weights(windows * s, None, s, self.pool, cast(k[..., :0]), xp=xp)
        pooled = []
        for name, x in (("open_keys", k), ("open_values", v)):
            tail = own[name]
            cut = rows_from(xp.concat([tail, x], axis=-2), tail.shape[-2] - phase, windows * s, xp)
            pooled.append(step.backend.pool(self.pool, cast(cut), weights)[0])
            new[name] = kept(tail, x, step.count, xp)
        if isinstance(count, int) and count == windows:
            return pooled[0], pooled[1], None
        real = below(windows, count, k, xp)
        lead = tuple(k.shape[:-3])
        real = xp.broadcast_to(real, (*lead, windows))
        k, v = (zeroed(x, count, xp) for x in pooled)
        return k, v, real

    def _convolved(
        self, step: Step, own: State, k: Any, count: Place, new: dict[str, Any], cast: Any
    ) -> Any:
        """Return new keys convolved with those before them."""
        xp, back = step.backend.xp, self.taps - 1
        weight = step.params[self.group]["weight"]
        if not back:
            return convolve(cast(k), weight, (0,), xp=xp)
        tail = own["taps"]
        before = tail[..., tail.shape[-2] - back :, :]
        new["taps"] = kept(tail, k, count, xp)
        x = cast(xp.concat([before, k], axis=-2))
        return convolve(x, weight, (back,), xp=xp)[..., back:, :]

    def _statistics(
        self,
        step: Step,
        own: State,
        k: Any,
        first: Any,
        phase: Place,
        real: Any,
        new: dict[str, Any],
    ) -> State:
        """Return the statistics of the new rows."""
        xp, rows, stats = step.backend.xp, step.k.shape[-2], self.statistics
        assert stats is not None
        old = {name: own[name] for name in MOMENTS if name in own}
        if rows == self.scale == 1 and real is None:
            states = after_one(old, k, xp)
        else:
            states = advance_moments(step.backend, stats, old, k, real)
            start = 1 if self.scale == 1 else 0
            states = {name: x[..., start:, :] for name, x in states.items()}
        if self.scale > 1:
            index = xp.arange(1, rows + 1, dtype=xp.int64, device=device_of(k))
            index = (index + place(phase, 1)) // self.scale
            states = {name: picked(x, index, xp) for name, x in states.items()}
        new["first"] = first
        new.update({name: kept(x, states[name], step.count, xp) for name, x in old.items()})
        return row_states(stats, states, first, xp)

    def _stored(
        self,
        step: Step,
        own: State,
        k: Any,
        v: Any,
        first: Place,
        count: Place,
        phase: Place,
        new: dict[str, Any],
    ) -> tuple[Any, Any, Any, Any]:
        """Return all keys that the new rows may see, with values, their mask, and the offset."""
        xp, s, ring = step.backend.xp, self.scale, "last_keys" in own
        if ring:
            at = own["last_keys"].shape[-2]
            start = at - first  # of the keys that exist
            names = ("last_keys", "last_values")
            pairs = list(zip(names, (k, v), strict=True))
            whole = [xp.concat([own[n], like(x, own[n], xp)], axis=-2) for n, x in pairs]
            # The same rows as `kept`, of arrays that are joined already.
            new.update({n: rows_from(x, count, at, xp) for n, x in zip(names, whole, strict=True)})
        else:
            at, start = first, 0
            where = (first, count, xp)
            whole = []
            for n, x in (("keys", k), ("values", v)):
                new[n] = written(own[n], like(x, own[n], xp), *where, in_place=step.in_place)
                whole.append(new[n])
        stop = at + count
        if self.left != math.inf:
            near = at - (int(self.left) - phase) // s
            start = later(start, near, xp)
        offset = at * s + phase
        if isinstance(start, int) and isinstance(stop, int) and step.longest is not None:
            start = max(start, 0)
            return *(x[..., start:stop, :] for x in whole), None, offset - start * s
        if not ring and step.longest is not None:
            longest = step.longest // s
            whole = [x[..., :longest, :] for x in whole]
        keys = whole[0].shape[-2]
        mask = below(keys, stop, k, xp) & ~below(keys, start, k, xp)
        mask = xp.broadcast_to(mask, (*k.shape[:-3], keys))
        return *whole, mask, offset

    def resized(self, state: State, capacity: int, xp: Any) -> dict[str, Any]:
        """Return the buffers of a state with room for more positions."""
        new = {}
        for name in (f"keys{self.suffix}", f"values{self.suffix}"):
            if name in state:
                x = state[name]
                shape = (*x.shape[:-2], capacity // self.scale - x.shape[-2], x.shape[-1])
                more = xp.zeros(shape, dtype=x.dtype, device=device_of(x))
                new[name] = xp.concat([x, more], axis=-2)
        return new

    def truncated(
        self, state: State, removed: Place, length: Place, xp: Any, in_place: bool
    ) -> Any:
        """Return the state without the last positions, of which `length` are left."""
        own = self.part(state)
        before = length + removed
        lost = whole_div(before, self.scale) - whole_div(length, self.scale)
        new = dict(own)
        for name, x in own.items():
            if name in ("keys", "values"):
                end = whole_div(length, self.scale)
                if in_place and isinstance(end, int):
                    x[..., end:, :] = 0
                elif in_place:
                    x[...] = zeroed(x, end, xp)
                else:
                    new[name] = zeroed(x, end, xp)
            elif name in ("taps", "last_keys", "last_values"):
                new[name] = rows_from(x, -lost, x.shape[-2], xp)
            elif name in ("sums", "sums_low"):
                flat = xp.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1]))
                new[name] = xp.reshape(rows_from(flat, -removed, x.shape[-3], xp), x.shape)
            elif name != "first":
                new[name] = rows_from(x, -removed, x.shape[-2], xp)
        return {name + self.suffix: x for name, x in new.items()}


def _features(plan: Plan, k: Any, params: State, xp: Any) -> Any:
    """Return the features of keys."""
    rows = Rows(k, k)
    for transform in plan.transforms:
        rows, _ = transform(rows, {}, params, xp=xp)
    return rows.k


def _caster(step: Step, xp: Any) -> Callable[[Any], Any]:
    wide = accumulation(step.k, xp)
    return lambda x: x if x.dtype == wide else xp.astype(x, wide)
