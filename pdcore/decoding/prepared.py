"""A decoder's plans for arrays of one kind, and the call that computes new rows by them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..arrays import compiling, library_of
from ..backend import ArrayBackend, Call, Carried, Inputs, accumulation
from ..dispatch import BoundAttention
from ..errors import UnsupportedError
from ..lowering import BatchRows, Features, Plan, Scores, Signature
from ..spec import AttentionSpec
from .checks import check_lengths, check_state, entries, values_at_hand
from .groups import HeadGroup, Step
from .rows import below, kept, rows_from
from .specs import plan_of, plan_of_last

__all__ = ["Prepared"]

State = Mapping[str, Any]

#: More than any capacity.
BEYOND = 2**30


class Prepared:
    """The backend, the plans and the parameters for arrays of one kind."""

    def __init__(
        self, bound: BoundAttention, q: Any, k: Any, v: Any, params: dict[str, Any]
    ) -> None:
        if q is not None and getattr(q, "shape", (0,))[-2:-1] != getattr(k, "shape", (1,))[-2:-1]:
            raise ValueError(
                f"k: got shape {tuple(k.shape)}, expected as many positions as q {tuple(q.shape)}"
            )
        backend, _, inputs, back = bound.prepare(Inputs(q, k, v, params=params))
        if back is not None or not isinstance(backend, ArrayBackend):
            raise UnsupportedError(
                f"decoder: backend {backend.info.name} does not run on arrays of "
                f"{library_of(q, 'q')} as they are; a decoder moves no state between libraries and "
                "devices, and needs a backend that is an ArrayBackend"
            )
        self.backend, self.request = backend, bound.request(inputs)
        spec = self.request.spec
        kind = Signature(q.shape[-1], k.shape[-3], self.request.dtype)
        self.plan = plan_of(spec, kind)
        self.groups = HeadGroup.of(spec, self.plan)
        call = Call(backend, self.plan, inputs)
        self.inputs = inputs
        self.params = {group: call.params(group) for group in self.plan.groups}
        self.last = plan_of_last(self.plan, spec, kind)
        self.features = isinstance(self.plan.contraction, Features)
        plain = len(self.groups) == 1 and not self.features and self.groups[0].statistics is None
        self._plain = plain
        # Whether keys are carried as the contraction reads them, whatever the statistics.
        batch_rows = [isinstance(t, BatchRows) for t in self.plan.transforms] == [True]
        wide = accumulation(k, backend.xp) == k.dtype
        folds = len(self.groups) == 1 and self.groups[0].statistics is not None
        self._folds = folds and batch_rows and wide and not self.plan.rescales
        self._folded = replace(self.last, transforms=(), summary=None)
        self._fused: dict[Any, Plan] = {}
        like = k[..., :0, :], v[..., :0, :]
        names = [
            set(g.zero(self.plan, self.params[g.group], *like, c, 0, backend.xp))
            for g in self.groups
            for c in (1,)
        ]
        self._checked: set[tuple[Any, ...]] = set()
        self.programs: dict[bool, Any] = {}
        self.names = entries({"lengths", "room"}.union(*names))

    def check(self, state: State, q: Any) -> None:
        """Check that a state is one of the decoder, for arrays like q, see `check_state`."""
        try:
            kind = (*state, state["lengths"].shape)
            if kind in self._checked:
                return
        except (AttributeError, KeyError, TypeError):
            kind = ()  # the check says what is wrong
        check_state(state, self.names, q)
        self._checked.add(kind)

    def rows(
        self,
        state: State,
        q: Any,
        k: Any,
        v: Any,
        lengths: Any,
        at: Any,
        longest: int | None,
        unchecked: bool,
        lse: bool,
        in_place: bool,
    ) -> Any:
        """Compute the rows of new positions and the next state, see `Decoder.extend`.

        Parameters
        ----------
        state, q, k, v, lengths, lse, in_place
            As in `Decoder.extend`.
        at : int or integer array (*B,)
            The lengths before the call.
        longest : int or None
            The largest length after it, where that is known.
        unchecked : bool
            Whether the capacity was not compared with the lengths.
        """
        xp, n = self.backend.xp, q.shape[-2]
        count: Any = n
        real = rank = None
        if lengths is not None:
            if lengths.ndim == state["lengths"].ndim:
                count = xp.astype(lengths, state["lengths"].dtype)
            else:
                count = xp.sum(xp.astype(lengths, state["lengths"].dtype), axis=-1)
                rank, (q, k, v) = _compacted(lengths, (q, k, v), xp)
            real = below(n, count, q, xp)
            q, k, v = (xp.where(real[..., None, :, None], x, xp.zeros_like(x)) for x in (q, k, v))
        step = Step(self.backend, self.plan, k, v, self.params, at, count, real, longest, in_place)
        advanced = [group.advance(step, state) for group in self.groups]
        out, level, runs = self.run(q, k, v, [carried for carried, _ in advanced], lse)
        new: dict[str, Any] = {
            "lengths": state["lengths"] + count,
            "room": state["room"] - count,
        }
        if "undo" in state:
            old = state["undo"][..., None, :, None]
            more = xp.ones_like(xp.broadcast_to(old[..., :1, :], (*old.shape[:-2], n, 1)))
            new["undo"] = kept(old, more, count, xp)[..., 0, :, 0]
        for index, (_, complete) in enumerate(advanced):
            new |= complete(runs[index].operands if runs else None)
        if unchecked:
            outside = ~below(n, state["room"], q, xp)
            out, level = _filled(out, level, outside, math.nan, math.nan, xp)
        if real is not None:
            out, level = _filled(out, level, ~real, 0.0, -math.inf, xp)
        if rank is not None:
            index = xp.broadcast_to(rank[..., None, :, None], out.shape)
            out = xp.take_along_axis(out, index, axis=out.ndim - 2)
            if level is not None:
                index = xp.broadcast_to(rank[..., None, :], level.shape)
                level = xp.take_along_axis(level, index, axis=level.ndim - 1)
            out, level = _filled(out, level, ~lengths, 0.0, -math.inf, xp)
        return ((out, level) if lse else out), new

    def truncated(
        self, state: State, lengths: Any, spec: AttentionSpec, in_place: bool
    ) -> dict[str, Any]:
        """Return the state of the first positions, see `Decoder.truncate`."""
        backend, xp = self.backend, self.backend.xp
        old = state["lengths"]
        if isinstance(lengths, int) and not isinstance(lengths, bool):
            lengths = xp.full_like(old, lengths)
        check_lengths(lengths, None, backend.info.library, tuple(old.shape))
        lengths = xp.astype(lengths, old.dtype)
        bounded = any(g.remembers for g in self.groups) or any(
            name.startswith("last_keys") for name in state
        )
        removed: Any = old - lengths
        if not bounded:
            most = old
        elif "undo" in state:
            most = xp.sum(xp.astype(state["undo"], old.dtype), axis=-1)
        else:
            most = xp.zeros_like(old)
        known = values_at_hand(removed, backend)
        spoiled = None
        if known is not None:
            limit = values_at_hand(most, backend)
            keep = values_at_hand(lengths, backend)
            if limit is None or keep is None or not _within(known, limit):
                raise ValueError(_cannot_truncate(spec, known, limit or [], lengths))
            equal = len(set(known)) == 1 and len(set(keep)) == 1
            if equal and not backend.compiles:
                removed, lengths = known[0], keep[0]
        else:
            spoiled = (removed < 0) | (removed > most)
        new: dict[str, Any] = {
            "lengths": old - removed,
            "room": state["room"] + removed,
        }
        if spoiled is not None:
            new["room"] = xp.where(spoiled, xp.full_like(old, -BEYOND), new["room"])
        if "undo" in state:
            undo = state["undo"][..., None, :, None]
            before = xp.concat([xp.zeros_like(undo), undo], axis=-2)
            size = undo.shape[-2]
            new["undo"] = rows_from(before, size - removed, size, xp)[..., 0, :, 0]
        for group in self.groups:
            new |= group.truncated(state, removed, lengths, xp, in_place)
        return new

    def run(
        self, q: Any, k: Any, v: Any, carried: list[Any], lse: bool
    ) -> tuple[Any, Any, list[Any]]:
        """Run the plan on what the groups carry."""
        last = q.shape[-2] == 1 and not self.features
        plan = self.last if last else self.plan
        backend, params = self.backend, self.inputs.params
        first = carried[0]
        if last and self._folds and not lse:
            # Statistics change the query alone, and the row constant cancels in out.
            q = self._transformed(q, first)
            plan, first = self._folded, first._replace(state={}, points={})
        if (self._plain or plan is self._folded) and (last or self.groups[0].scale == 1):
            c = plan.contraction
            placed = not last or (isinstance(c, Scores) and c.places)
            offset = first.offset if placed else 0  # else no position is read
            inputs = Inputs(q, first.k, first.v, None, first.key_mask, None, offset, params)
            out, level = backend.attention(self._chosen(plan, inputs, lse), inputs, lse=lse)
            return out, level, []
        inputs = Inputs(q, k, v, params=params)
        if not self.features:
            offset = first.offset
            like = Inputs(q, first.k, first.v, None, first.key_mask, None, offset, params)
            chosen = self._chosen(plan, like, lse)
            plan = replace(chosen, transforms=plan.transforms)
        return backend.decode(plan, inputs, carried, lse=lse)

    def _transformed(self, q: Any, carried: Carried) -> Any:
        """Return queries (*B, Hq, 1, D) after the transforms, which leave carried keys alone."""
        shape, heads, xp = q.shape, carried.k.shape[-3], self.backend.xp
        [fold] = self.plan.transforms
        assert isinstance(fold, BatchRows)
        rows = xp.reshape(q, (*shape[:-3], heads, shape[-3] // heads, shape[-1]))
        params = self.params[self.groups[0].group]
        # A single key is relative to itself, 0, so that no q' needs to be set to 0.
        return xp.reshape(fold.queries(rows, carried.state, params, xp=xp), shape)

    def _chosen(self, plan: Plan, inputs: Inputs, lse: bool) -> Plan:
        """Return the plan with the backend's choice of kernels, the same for all lengths."""
        masked, static = inputs.key_mask is not None, isinstance(inputs.offset, int)
        key = (plan is self.plan, bool(plan.transforms), masked, static, lse, inputs.q.shape[-2])
        found = self._fused.get(key)
        if found is None and compiling():
            return plan  # the choice is no part of a trace
        if found is None:
            request = self.request._replace(
                spec=plan.spec,
                q=tuple(inputs.q.shape),
                k=tuple(inputs.k.shape),
                v=tuple(inputs.v.shape),
                key_mask=tuple(inputs.key_mask.shape) if masked else None,
                offset="int" if static else "sequence",
                lse=lse,
            )
            found = self._fused[key] = self.backend.fuse(plan, request)
        return found


def _within(values: list[int], limits: list[int]) -> bool:
    return all(0 <= value <= limit for value, limit in zip(values, limits, strict=True))


def _cannot_truncate(spec: AttentionSpec, removed: list[int], most: list[int], lengths: Any) -> str:
    """Return the message for positions that cannot be taken back."""
    if min(removed) < 0:
        return (
            f"lengths: got {lengths}, which is more than the state has; expected at most its "
            "lengths: truncate takes positions back"
        )
    return (
        f"lengths: got {lengths}, which takes {max(removed)} positions back, expected at "
        f"most {min(most)}: the state of {spec} holds sums or dropped keys, and takes back "
        "no more than undo= of init"
    )


def _compacted(real: Any, arrays: tuple[Any, ...], xp: Any) -> tuple[Any, list[Any]]:
    """Return the rank of each position among the real ones, and arrays with real rows first."""
    order = xp.argsort(xp.astype(~real, xp.int64), axis=-1, stable=True)
    moved = []
    for x in arrays:
        index = xp.broadcast_to(order[..., None, :, None], x.shape)
        moved.append(xp.take_along_axis(x, index, axis=x.ndim - 2))
    rank = xp.cumulative_sum(xp.astype(real, xp.int64), axis=-1) - 1
    return xp.maximum(rank, xp.zeros_like(rank)), moved


def _filled(
    out: Any, level: Any, where: Any, value: float, of_level: float, xp: Any
) -> tuple[Any, Any]:
    """Return results (*B, H, N, Dv) and (*B, H, N) with a value in some rows, bool (*B, N)."""
    where = where[..., None, :]
    out = xp.where(where[..., None], xp.full_like(out, value), out)
    return out, level if level is None else xp.where(where, xp.full_like(level, of_level), level)
