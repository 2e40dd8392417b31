"""The contraction by scores on JAX: blocks of rows and keys, differentiable to any order.

The derivative is written as a tangent, d_out = sum_j p_j (dl_j v_j + dv_j) - out sum_j p_j dl_j
with p_j = exp(l_j - L), which recomputes p by blocks. JAX transposes it for reverse mode;
`jax.checkpoint` on every block keeps the memory of that at O(N + M). Because p is computed from
the primal inputs and from L, which has a tangent of its own, derivatives of derivatives, `vmap`
and `jvp` need nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from pdcore import score_contraction
from pdcore.feature_contraction import shifted_features
from pdcore.operands import Operands
from pdcore.plan import Scores
from pdcore.score_contraction import divide, finite, log_weight, relative_features
from pdcore.support import Visibility, all_of

from .blocks import Arrays, Call, flat, over_heads, over_keys, over_rows, sizes
from .namespace import NAMESPACE as xp

__all__ = ["scores"]

Result = TypeVar("Result")

# A derivative is traced after the call, outside whatever precision surrounds that.
_IN_FULL = lax.Precision.HIGHEST


def scores(c: Scores, o: Operands, *, turns: bool) -> tuple[Any, Any]:
    """Contract by scores.

    Parameters
    ----------
    c : Scores
        The contraction.
    o : Operands
        What it reads.
    turns : bool
        Whether heads may take turns, see `.blocks.sizes`.

    Returns
    -------
    out : array (*B, H, G, N, Dv)
    L : array (*B, H, G, N)
        As `pdcore.score_contraction.scores`.
    """
    seen = o.visibility
    *lead, group, rows, _ = o.q.shape
    keys = o.k.shape[-2]
    if not (o.q.size and o.k.size and o.v.shape[-1]):
        return score_contraction.scores(c, o, xp=xp)
    if c.weight == "log" and c.expression is None:
        # There are fewer queries than scores to scale.
        o, c = o._replace(q=o.q * c.scale), replace(c, scale=1.0)
    arrays: Arrays = {"q": o.q, "k": o.k, "v": o.v}
    for name, x in (("key_bias", o.key_bias), ("bias", o.bias), ("key_mask", seen.key_mask)):
        if x is not None:
            arrays[name] = x
    if seen.mask is not None:
        arrays["mask"] = seen.by_mask(0, rows, 0, keys)
    if not seen.static:
        arrays["offset"] = jnp.asarray(seen.offset)
    for name, x in o.values.items():
        arrays[f"value {name}"] = jnp.broadcast_to(x, (*lead, 1, 1, 1))
    call = Call(
        c, seen.support, rows, keys, seen.scale, seen.offset if seen.static else None,
        sizes(math.prod(lead), group, rows, keys, turns=turns),
    )  # fmt: skip
    if turns and not call.sizes.mapped:
        # XLA's products of many small matrices are several times as fast with one axis of heads.
        arrays = flat(arrays)
    out, level = _contract(call, arrays)
    return jnp.reshape(out, (*o.q.shape[:-1], -1)), jnp.reshape(level, o.q.shape[:-1])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _contract(call: Call, arrays: Arrays) -> tuple[Any, Any]:
    def rows(given: Arrays) -> Arrays:
        return over_rows(call, partial(_forward, call), given)

    found = over_heads(call, rows, arrays) if call.sizes.mapped else rows(arrays)
    return found["out"], found["level"]


class _Sums(NamedTuple):
    """Sums over keys relative to exp(peak)."""

    values: Any
    total: Any
    peak: Any


def _forward(call: Call, arrays: Arrays, visibility: Visibility, whole: bool) -> Arrays:
    """Contract a block of rows with all keys that it can see."""
    c = call.contraction

    def body(cut: Arrays, seen: Visibility) -> _Sums:
        o = _operands(cut, seen, whole)
        if c.weight == "log":
            logits = _logits(c, _inner(o.q, o.k), o)
            peak = jnp.max(logits, axis=-1, keepdims=True)
            # Without the barrier exp is computed twice, for the sum and for the product.
            p = lax.optimization_barrier(jnp.exp(logits - finite(peak, xp)))
        else:
            rows, keys, peak = relative_features(c, o.q, o.k[..., None, :, :], xp=xp)
            p = _seen_only(_inner(rows, keys[..., 0, :, :]), o)
        return _Sums(_times(p, o.v), jnp.sum(p, axis=-1, keepdims=True), peak)

    def merge(a: _Sums, b: _Sums) -> _Sums:
        peak = jnp.maximum(a.peak, b.peak)
        left, right = (jnp.exp(x.peak - finite(peak, xp)) for x in (a, b))
        return _Sums(
            a.values * left + b.values * right, a.total * left + b.total * right, peak
        )  # fmt: skip

    found: _Sums = over_keys(call, body, merge, arrays, visibility)
    if c.signed:
        # Only feature maps without a log domain are signed, so every exponent was 0.
        return {"out": found.values, "level": jnp.zeros_like(found.total[..., 0])}
    out, level = divide(found.values, found.total, finite(found.peak, xp), xp=xp)
    return {"out": out, "level": level}


@partial(_contract.defjvp, symbolic_zeros=True)
def _contract_jvp(call: Call, primals: tuple[Arrays], tangents: tuple[Arrays]) -> Any:
    [arrays] = primals
    out, level = _contract(call, arrays)
    moved = {
        f"d_{name}": t for name, t in tangents[0].items()
        if not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0
    }  # fmt: skip
    call, given, moved = _plain(call, {**arrays, "out": out, "level": level}, moved)
    # The outermost blocks are checkpointed so that no residual but these arrays is kept.
    found = _kept(partial(_tangents, call), given, moved)
    return (out, level), (found["out"], found["level"])


def _kept(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of which only the arguments are kept for a derivative."""
    found: Result = jax.checkpoint(function, prevent_cse=False)(*arguments)
    return found


def _plain(call: Call, arrays: Arrays, moved: Arrays) -> tuple[Call, Arrays, Arrays]:
    """Turn log features, and what moves, into features with their maxima subtracted."""
    c = call.contraction
    if c.weight != "log_features":
        return call, arrays, moved
    o = _operands(arrays, call.visibility(call.rows, call.keys, 0), whole=True)
    # phi = exp(log phi - shift); what follows does not depend on the shifts.
    plain, shift = shifted_features(o, xp=xp)
    features = Scores(weight="features", signed=c.signed)
    found = {**arrays, "q": plain.q, "k": plain.k, "level": arrays["level"] - shift}
    moves = {name: found[name.removeprefix("d_")] * t if name in ("d_q", "d_k") else t
             for name, t in moved.items()}  # fmt: skip
    return replace(call, contraction=features), found, moves


def _tangents(call: Call, arrays: Arrays, moved: Arrays) -> Arrays:
    def block(cut: Arrays, visibility: Visibility, whole: bool) -> Arrays:
        return _kept(lambda x: _tangent(call, x, visibility, whole), cut)

    def rows(given: Arrays) -> Arrays:
        return over_rows(call, block, given)

    given = {**arrays, **moved}
    if not call.sizes.mapped:
        return rows(given)
    return over_heads(call, partial(_kept, rows), given)


def _tangent(call: Call, arrays: Arrays, visibility: Visibility, whole: bool) -> Arrays:
    """Give the tangent of a block of rows."""
    c = call.contraction
    out, level = arrays["out"], arrays["level"][..., None]

    def body(cut: Arrays, seen: Visibility) -> tuple[Any, Any]:
        p, slope = _linearised(c, cut, _operands(cut, seen, whole), level)
        moved = jnp.zeros_like(out) if slope is None else _times(slope, cut["v"])
        if "d_v" in cut:
            moved = moved + _times(p, cut["d_v"])
        total = jnp.zeros_like(level) if slope is None else jnp.sum(slope, -1, keepdims=True)
        return moved, total

    def merge(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
        return a[0] + b[0], a[1] + b[1]

    def kept(cut: Arrays, seen: Visibility) -> tuple[Any, Any]:
        return _kept(lambda x: body(x, seen), cut)

    several = arrays["k"].shape[-2] > call.sizes.keys
    moved, total = over_keys(call, kept if several else body, merge, arrays, visibility)
    if c.signed:
        return {"out": moved, "level": jnp.zeros_like(total[..., 0])}
    return {"out": moved - out * total, "level": total[..., 0]}


def _linearised(c: Scores, cut: Arrays, o: Operands, level: Any) -> tuple[Any, Any]:
    """Give the normalised weights of a block, and weights times the tangent of log weight.

    The second is None where nothing that the weights depend on moves.
    """
    moves = []
    if "d_q" in cut:
        moves.append(_inner(cut["d_q"], cut["k"]))
    if "d_k" in cut:
        moves.append(_inner(cut["q"], cut["d_k"]))
    ds = sum(moves[1:], moves[0]) if moves else None
    s = _inner(o.q, o.k)
    if c.weight == "features":
        inverse = jnp.where(level == -jnp.inf, 0.0, jnp.exp(-finite(level, xp)))
        slope = None if ds is None else _seen_only(ds, o) * inverse
        return _seen_only(s, o) * inverse, slope
    p = jnp.exp(_logits(c, s, o) - finite(level, xp))
    p = jnp.where(level == -jnp.inf, 0.0, p)
    # A weight of 0 has no gradient: kappa's derivative, not that of log kappa, counts.
    none = p == 0
    slopes = []
    if ds is not None:
        slopes.append(_slope(c, "s", s, o, p, none) * ds)
    for name in o.values:
        if f"d_value {name}" in cut:
            slopes.append(_slope(c, name, s, o, p, none) * cut[f"d_value {name}"])
    if "d_key_bias" in cut:
        slopes.append(p * cut["d_key_bias"][..., None, None, :])
    if "d_bias" in cut:
        slopes.append(p * cut["d_bias"])
    return p, sum(slopes[1:], slopes[0]) if slopes else None


def _slope(c: Scores, name: str, s: Any, o: Operands, p: Any, none: Any) -> Any:
    """Give the derivative of the weight by `name`, relative to the row's sum."""
    if c.expression is None:
        return c.scale * p
    # Where the weight is 0 the derivative of its log may be infinite, and so may that one's.
    safe = jnp.where(none, 1.0, s)
    slope = c.expression.derivative(name)({"s": safe, **o.values}, xp)
    return jnp.where(none, 0.0, p * slope)


class _Seen(NamedTuple):
    """What a block sees, in place of a `Visibility`."""

    position: Visibility | None
    key_mask: Any
    mask: Any

    def block(self, start: int, stop: int, first: int, last: int) -> Any:
        """Say which queries see which keys; the arguments are those of `Visibility.block`."""
        parts = []
        if self.position is not None:
            v = self.position
            parts.append(v.by_position(0, v.rows, 0, v.keys))
        if self.key_mask is not None:
            parts.append(self.key_mask[..., None, None, :])
        if self.mask is not None:
            parts.append(self.mask)
        return all_of(parts)


def _operands(cut: Arrays, visibility: Visibility, whole: bool) -> Operands:
    seen: Any = _Seen(None if whole else visibility, cut.get("key_mask"), cut.get("mask"))
    prefix = "value "
    values = {n.removeprefix(prefix): x for n, x in cut.items() if n.startswith(prefix)}
    return Operands(cut["q"], cut["k"], cut["v"], cut.get("key_bias"), cut.get("bias"), values,
                    seen)  # fmt: skip


def _logits(c: Scores, s: Any, o: Operands) -> Any:
    return log_weight(c, s, o, 0, s.shape[-2], 0, s.shape[-1], xp=xp)


def _seen_only(x: Any, o: Operands) -> Any:
    seen = o.visibility.block(0, 0, 0, 0)
    return x if seen is None else jnp.where(seen, x, 0.0)


def _inner(q: Any, k: Any) -> Any:
    """Multiply rows (..., G, R, D) by keys (..., M, D): one product for all G heads."""
    if q.shape[-3] == 1:  # XLA has faster products without the axis
        return _product(q[..., 0, :, :], k, -1)[..., None, :, :]
    return jnp.einsum("...grd,...md->...grm", q, k, precision=_IN_FULL)


def _times(p: Any, v: Any) -> Any:
    """Multiply weights (..., G, R, M) by values (..., M, D)."""
    if p.shape[-3] == 1:
        return _product(p[..., 0, :, :], v, -2)[..., None, :, :]
    return jnp.einsum("...grm,...md->...grd", p, v, precision=_IN_FULL)


def _product(a: Any, b: Any, axis: int) -> Any:
    """Contract the last axis of `a` with one of `b`; einsum may order them less well."""
    lead = tuple(range(a.ndim - 2))
    contracted = (a.ndim - 1,), (axis % b.ndim,)
    return lax.dot_general(a, b, (contracted, (lead, lead)), precision=_IN_FULL)
