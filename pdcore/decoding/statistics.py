"""What a decoder carries in place of earlier keys: statistics of prefixes, and sums of features.

Each has the value after every one of the last positions, on an axis of rows, so that a truncation
selects a value and never subtracts. Sums are compensated: a number `x` has its rounding error
`x_low` beside it, so that the error does not grow with the number of tokens (T. J. Dekker, A
Floating-Point Technique for Extending the Available Precision, 1971).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..lowering import Rows, ScaledRows, largest_key
from ..spec import Mean
from .rows import Place, below, last_row, place, rows_from, two_sum

__all__ = [
    "MOMENTS",
    "SUMS",
    "advance_moments",
    "advance_sums",
    "after_one",
    "before_of",
    "first_key",
    "largest_of",
    "row_states",
    "shrink_of",
]

State = Mapping[str, Any]

#: The entries of the statistics of prefixes, and of sums of features.
MOMENTS = ("n", "mean", "mean_low", "m2", "m2_low")
SUMS = ("sums", "sums_low", "top")


def merged(a: State, b: State, xp: Any) -> State:
    """Merge compensated moments with those of keys after them (Chan, Golub and LeVeque, 1979)."""
    n = a["n"] + b["n"]
    weight = b["n"] / xp.where(n > 0, n, xp.ones_like(n))
    delta = (b["mean"] - a["mean"]) - a["mean_low"]
    mean, mean_low = two_sum(a["mean"], a["mean_low"] + delta * weight)
    state = {"n": n, "mean": mean, "mean_low": mean_low}
    if "m2" in b:
        more = b["m2"] + delta * delta * (a["n"] * weight)
        state["m2"], state["m2_low"] = two_sum(a["m2"], a["m2_low"] + more)
    return state


def advance_moments(backend: Any, stats: Mean, old: State, keys: Any, real: Any) -> State:
    """Return the moments after 0, 1, ... of the keys (*B, H, W, D), relative to the first key.

    Parameters
    ----------
    backend : ArrayBackend
    stats : Mean or Moments
    old : mapping
        Moments, of which the last row is the present one.
    keys : array (*B, H, W, D)
        New keys, relative to the first key.
    real : bool array (*B, W) or None
        Which of them exist.
    """
    xp = backend.xp
    last = {name: last_row(x) for name, x in old.items()}
    mask = None if real is None else real[..., None, :, None]
    return merged(last, backend.prefix_states(stats, keys, mask), xp)


def after_one(old: State, key: Any, xp: Any) -> State:
    """Return the moments after one more key (*B, H, 1, D), relative to the first key."""
    last = {name: last_row(x) for name, x in old.items()}
    n = last["n"] + 1.0
    delta = (key - last["mean"]) - last["mean_low"]
    mean, mean_low = two_sum(last["mean"], last["mean_low"] + delta / n)
    state = {"n": n, "mean": mean, "mean_low": mean_low}
    if "m2" in last:
        more = delta * delta * (last["n"] / n)
        state["m2"], state["m2_low"] = two_sum(last["m2"], last["m2_low"] + more)
    return state


def row_states(stats: Mean, states: State, first: Any, xp: Any) -> State:
    """Return the finalised statistics of compensated moments relative to the first key."""
    plain = {"n": states["n"], "mean": states["mean"] + states["mean_low"]}
    if "m2" in states:
        plain["m2"] = states["m2"] + states["m2_low"]
    final = stats.finalize(plain, xp=xp)
    return {**final, "mean": final["mean"] + first}


def largest_of(plan: Any, k: Any, real: Any, params: Any, old: State, xp: Any) -> State:
    """Return ``largest``, of all keys so far, where the plan scales features by it."""
    rows = Rows(k[..., :0, :], k, key_mask=None if real is None else real[..., None, :])
    for transform in plan.transforms:
        if isinstance(transform, ScaledRows):
            if not k.shape[-2]:
                return {"largest": last_row(old["top"])}
            largest = largest_key(rows.k, rows.key_mask, xp=xp)
            return {"largest": xp.maximum(last_row(old["top"]), largest)}
        rows, _ = transform(rows, {}, params, xp=xp)
    return {}


def shrink_of(plan: Any, old: State, points: State, xp: Any) -> Any:
    """Return the scale of sums, (*B, H, 1, 1), over that of new features; None for no scale."""
    if "largest" not in points:
        return None
    phi, top = plan.contraction.kernel, last_row(old["top"])
    was, now = (phi.feature_scale(x, xp=xp).log for x in (top, points["largest"]))
    return xp.exp(was - now)


def before_of(plan: Any, old: State, shrink: Any, xp: Any) -> tuple[Any, Any]:
    """Return the sums before new keys as a contraction reads them, see `Carried`."""
    sums = old["sums"][..., -1, :, :] + old["sums_low"][..., -1, :, :]
    if plan.contraction.log:
        return sums, last_row(old["top"])
    return (sums if shrink is None else sums * shrink), None


def advance_sums(
    step: Any, old: State, points: State, shrink: Any, operands: Any, ends: list[Any]
) -> State:
    """Return sums of features after new keys, for as many last positions as `old` has.

    Parameters
    ----------
    step : Step
    old : mapping
        ``sums`` and ``sums_low`` (*B, H, R, F, Dv + 1), and ``top`` (*B, H, R, F or 1).
    points : mapping
        ``largest``, see `Carried`.
    shrink : array or None
        See `shrink_of`.
    operands : Operands
        The features of the new keys, and their values.
    ends : list of int or integer array (*B,)
        How many of the new keys the value after each of the last R positions counts; those of
        positions before this call count none.
    """
    xp, k, rows = step.backend.xp, operands.k, old["sums"].shape[-3]
    values = xp.concat([operands.v, xp.ones_like(k[..., :1])], axis=-1)
    top = now = last_row(old["top"])
    if step.plan.contraction.log:
        mask = operands.visibility.key_mask
        real = k if mask is None else xp.where(mask[..., None], k, xp.full_like(k, -xp.inf))
        if k.shape[-2]:
            now = xp.maximum(top, xp.max(real, axis=-2, keepdims=True))
        base = xp.where(now == -xp.inf, xp.zeros_like(now), now)
        k = xp.exp(k - base)
        shrink = xp.matrix_transpose(xp.exp(top - base))
    else:
        now = points.get("largest", top)
    last, low = old["sums"][..., -1, :, :], old["sums_low"][..., -1, :, :]
    if shrink is not None:
        last, low = last * shrink, low * shrink
    new = []
    for end in ends:
        cut = k
        if not isinstance(end, int) or end < k.shape[-2]:
            seen = below(k.shape[-2], end, k, xp)[..., None, :, None]
            cut = xp.where(seen, k, xp.zeros_like(k))
        more = xp.matmul(xp.matrix_transpose(cut), values)
        new.append(two_sum(last, low + more))
    count = step.count
    if rows == 1 and isinstance(count, int) and count:
        return {
            "sums": new[0][0][..., None, :, :],
            "sums_low": new[0][1][..., None, :, :],
            "top": now,
        }
    flat = (*last.shape[:-2], 1, last.shape[-2] * last.shape[-1])
    result: dict[str, Any] = {}
    for index, name in enumerate(("sums", "sums_low")):
        before = xp.reshape(old[name], (*flat[:-2], rows, flat[-1]))
        steps = xp.concat([xp.reshape(pair[index], flat) for pair in new], axis=-2)
        result[name] = xp.reshape(_selected(before, steps, count, xp), old[name].shape)
    tops = xp.broadcast_to(now, (*now.shape[:-2], rows, now.shape[-1]))
    return {**result, "top": _selected(old["top"], tops, count, xp)}


def _selected(old: Any, new: Any, count: Place, xp: Any) -> Any:
    """Return the values after the last positions: `new` for positions of this call, else `old`."""
    rows = old.shape[-2]
    if isinstance(count, int) and count >= rows:
        return new
    moved = rows_from(old, count, rows, xp)
    later = ~below(rows, rows - count, old, xp)
    return xp.where(later[..., None, :, None], new, moved)


def first_key(old: Any, k: Any, at: Place, count: Place, xp: Any) -> Any:
    """Return the first key of each head, (*B, H, 1, D): of the new keys where there was none."""
    if not k.shape[-2]:
        return old
    if isinstance(at, int) and isinstance(count, int):
        return old if at or not count else k[..., :1, :]
    empty = (place(at, 3) == 0) & (place(count, 3) > 0)
    return xp.where(empty, k[..., :1, :], old)
