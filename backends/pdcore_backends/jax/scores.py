"""The contraction by scores on JAX: blocks of rows and keys, differentiable to any order.

The derivative is written as a tangent, d_out = sum_j p_j (dl_j v_j + dv_j) - out sum_j p_j dl_j
with p_j = exp(l_j - L), which recomputes p by blocks. JAX transposes it for reverse mode;
`jax.checkpoint` on every block keeps the memory of that at O(N + M); small heads, of which all
weights are a block, keep them instead of computing them again. Because p is computed from
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

from pdcore.extend import (
    Operands,
    Scores,
    Visibility,
    all_of,
    divide,
    finite,
    log_weight,
    relative_features,
    score_contraction,
    shifted_features,
)

from .blocks import Arrays, StaticCall, flat, over_heads, over_keys, over_rows, sizes, ungrouped
from .namespace import NAMESPACE as xp

__all__ = ["checkpointed", "contract", "contract_tangents", "nonzero", "prepared", "scores"]

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
        As `pdcore.extend.scores`.
    """
    if not (o.q.size and o.k.size and o.v.shape[-1]):
        return score_contraction.scores(c, o, xp=xp)
    call, arrays = prepared(c, o, turns=turns)
    plain = c.weight == "log" and c.expression is None
    contracted = _contract_kept if plain and call.sizes.kept else contract
    out, level = contracted(call, arrays)
    return jnp.reshape(out, (*o.q.shape[:-1], -1)), jnp.reshape(level, o.q.shape[:-1])


def prepared(c: Scores, o: Operands, *, turns: bool) -> tuple[StaticCall, Arrays]:
    """Part what is static about a contraction, which is not empty, from its arrays."""
    seen = o.visibility
    *lead, group, rows, _ = o.q.shape
    keys = o.k.shape[-2]
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
    if group == 1:
        arrays = ungrouped(arrays)
    call = StaticCall(
        c,
        seen.support,
        rows,
        keys,
        seen.scale,
        seen.offset if seen.static else None,
        sizes(math.prod(lead), group, rows, keys, turns=turns, restricts=seen.support.restricts),
    )
    if turns and not call.sizes.mapped:
        # XLA's products of many small matrices are several times as fast with one axis of heads.
        arrays = flat(arrays)
    return call, arrays


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def contract(call: StaticCall, arrays: Arrays) -> tuple[Any, Any]:
    """Give (out, L) of what `prepared` gave, in the shapes of its arrays."""

    def rows(block: Arrays) -> Arrays:
        return over_rows(call, partial(_forward, call), block)

    results = over_heads(call, rows, arrays) if call.sizes.mapped else rows(arrays)
    return results["out"], results["level"]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _contract_kept(call: StaticCall, arrays: Arrays) -> tuple[Any, Any]:
    """Contract heads that are so small that a derivative may keep all weights."""
    result: tuple[Any, Any] = contract(call, arrays)
    return result


@partial(_contract_kept.defjvp, symbolic_zeros=False)
def _contract_kept_jvp(call: StaticCall, primals: tuple[Arrays], tangents: tuple[Arrays]) -> Any:
    def run(arrays: Arrays) -> tuple[Any, Any]:
        results = over_rows(call, partial(_forward, call, derived=True), arrays)
        return results["out"], results["level"]

    return jax.jvp(run, primals, tangents)


class _WeightedSums(NamedTuple):
    """Sums over keys relative to exp(peak)."""

    values: Any
    total: Any
    peak: Any


def _forward(
    call: StaticCall, arrays: Arrays, visibility: Visibility, whole: bool, *, derived: bool = False
) -> Arrays:
    """Contract a block of rows with all keys that it can see; `derived`, where JAX derives it."""
    c, arrays = _scaled(call.contraction, arrays)

    def body(cut: Arrays, seen: Visibility) -> _WeightedSums:
        o = _operands(cut, seen, whole)
        if c.weight == "log":
            logits = _logits(c, _inner(o.q, o.k), o)
            peak = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
            # Without the barrier exp is computed twice, for the sum and for the product.
            p = lax.optimization_barrier(jnp.exp(logits - _base(peak)))
        else:
            k = o.k if o.q.ndim == o.k.ndim else o.k[..., None, :, :]
            rows, keys, peak = relative_features(c, o.q, k, xp=xp)
            p = _seen_only(_inner(rows, jnp.reshape(keys, o.k.shape)), o)
        return _WeightedSums(_times(p, o.v), jnp.sum(p, axis=-1, keepdims=True), peak)

    def merge(a: _WeightedSums, b: _WeightedSums) -> _WeightedSums:
        peak = jnp.maximum(a.peak, b.peak)
        left, right = (jnp.exp(x.peak - _base(peak)) for x in (a, b))
        return _WeightedSums(
            a.values * left + b.values * right, a.total * left + b.total * right, peak
        )

    sums: _WeightedSums = over_keys(call, body, merge, arrays, visibility)
    if c.signed:
        # Only feature maps without a log domain are signed, so every exponent was 0.
        return {"out": sums.values, "level": jnp.zeros_like(sums.total[..., 0])}
    if c.weight == "log" and not derived:
        # The total is 0 where no key is seen, otherwise at least 1.
        total = jnp.maximum(sums.total, jnp.finfo(sums.total.dtype).tiny)
        level = jnp.log(sums.total) + _base(sums.peak)
        return {"out": sums.values / total, "level": level[..., 0]}
    out, level = divide(sums.values, sums.total, finite(sums.peak, xp), xp=xp)
    return {"out": out, "level": level}


def _base(peak: Any) -> Any:
    """Make the maximum of no visible key finite: exp(-inf - -inf) is NaN.

    `finite` does so by a selection, which keeps XLA from computing small heads in one fusion.
    """
    return jnp.maximum(peak, jnp.finfo(peak.dtype).min)


@partial(contract.defjvp, symbolic_zeros=True)
def _contract_jvp(call: StaticCall, primals: tuple[Arrays], tangents: tuple[Arrays]) -> Any:
    [arrays] = primals
    out, level = contract(call, arrays)
    results = {**arrays, "out": out, "level": level}
    # The outermost blocks are checkpointed so that no residual but these arrays is kept.
    derivatives = checkpointed(partial(contract_tangents, call), results, nonzero(tangents[0]))
    return (out, level), (derivatives["out"], derivatives["level"])


def nonzero(tangents: Arrays) -> Arrays:
    """Keep the tangents that are not known to be zero, by the names ``d_q`` and so on."""
    return {
        f"d_{name}": t
        for name, t in tangents.items()
        if not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0
    }


def contract_tangents(call: StaticCall, arrays: Arrays, moved: Arrays) -> Arrays:
    """Give the tangents of ``out`` and ``level``, which `arrays` holds too.

    They are sums over keys: what disjoint sets of keys give adds up, where ``out`` and ``level``
    are those of all of them.
    """
    return _tangents(*_plain(call, arrays, moved))


def checkpointed(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of which only the arguments are kept for a derivative."""
    result: Result = jax.checkpoint(function, prevent_cse=False)(*arguments)
    return result


def _plain(call: StaticCall, arrays: Arrays, moved: Arrays) -> tuple[StaticCall, Arrays, Arrays]:
    """Turn log features, and what moves, into features with their maxima subtracted."""
    c = call.contraction
    if c.weight != "log_features":
        return call, arrays, moved
    q, k = arrays["q"], arrays["k"]
    grouped = q if q.ndim > k.ndim else q[..., None, :, :]
    seen: Any = _Seen(None, arrays.get("key_mask"), None)
    # phi = exp(log phi - shift); what follows does not depend on the shifts.
    plain, shift = shifted_features(Operands(grouped, k, k, None, None, {}, seen), xp=xp)
    features = Scores(weight="features", signed=c.signed)
    level = arrays["level"] - jnp.reshape(shift, q.shape[:-1])
    shifted = {**arrays, "q": jnp.reshape(plain.q, q.shape), "k": plain.k, "level": level}
    moves = {
        name: shifted[name.removeprefix("d_")] * t if name in ("d_q", "d_k") else t
        for name, t in moved.items()
    }
    return replace(call, contraction=features), shifted, moves


def _tangents(call: StaticCall, arrays: Arrays, moved: Arrays) -> Arrays:
    def block(cut: Arrays, visibility: Visibility, whole: bool) -> Arrays:
        return checkpointed(lambda x: _tangent(call, x, visibility, whole), cut)

    def rows(part: Arrays) -> Arrays:
        return over_rows(call, block, part)

    both = {**arrays, **moved}
    if not call.sizes.mapped:
        return rows(both)
    return over_heads(call, partial(checkpointed, rows), both)


def _tangent(call: StaticCall, arrays: Arrays, visibility: Visibility, whole: bool) -> Arrays:
    """Give the tangent of a block of rows.

    Weights and what is multiplied by them have keys as the outer axis, ahead of those of rows.
    Derivatives by keys and values are products over the rows, which are several times as fast on
    a CPU where rows lie inside; XLA would put them elsewhere, but for the barriers.
    """
    c, arrays = _scaled(call.contraction, arrays)
    rows = 1 + arrays["q"].ndim - arrays["k"].ndim
    level = _across(arrays["level"][..., None], rows)

    def body(cut: Arrays, seen: Visibility) -> tuple[Any, Any]:
        p, slope = _linearised(c, cut, _operands(cut, seen, whole, across=True), level, rows)
        moved = []
        if slope is not None:
            moved.append(_product(cut["v"], slope, -2, -1 - rows))
        if "d_v" in cut:
            moved.append(_product(cut["d_v"], p, -2, -1 - rows))
        total = (
            jnp.zeros_like(level)
            if slope is None
            else jnp.sum(slope, axis=-1 - rows, keepdims=True)
        )
        return sum(moved[1:], moved[0]), total

    def merge(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
        return a[0] + b[0], a[1] + b[1]

    def kept(cut: Arrays, seen: Visibility) -> tuple[Any, Any]:
        return checkpointed(lambda x: body(x, seen), cut)

    several = arrays["k"].shape[-2] > call.sizes.keys
    moved, total = over_keys(call, kept if several else body, merge, arrays, visibility)
    moved, total = (jnp.moveaxis(x, -1 - rows, -1) for x in (moved, total))
    if c.signed:
        return {"out": moved, "level": jnp.zeros_like(total[..., 0])}
    return {"out": moved - arrays["out"] * total, "level": total[..., 0]}


def _scaled(c: Scores, arrays: Arrays) -> tuple[Scores, Arrays]:
    """Scale the queries of a block in place of its scores, of which there are more."""
    if c.weight != "log" or c.expression is not None:
        return c, arrays
    scaled: Arrays = {n: arrays[n] * c.scale for n in ("q", "d_q") if n in arrays}
    return replace(c, scale=1.0), {**arrays, **scaled}


def _linearised(c: Scores, cut: Arrays, o: Operands, level: Any, rows: int) -> tuple[Any, Any]:
    """Give the normalised weights of a block, and weights times the tangent of log weight.

    The second is None where nothing that the weights depend on moves. Both are (M, [G,] R), see
    `_tangent`.
    """
    ds = []
    if "d_q" in cut:
        ds.append(_product(_turned(o.k, 1), _turned(cut["d_q"], rows), -2, -1 - rows))
    q = _turned(o.q, rows)
    if "d_k" in cut:
        ds.append(_product(cut["d_k"], q, -1, -1 - rows))
    s = _product(o.k, q, -1, -1 - rows)
    # exp(l - inf) is 0 in rows that see no key.
    level = jnp.where(level == -jnp.inf, jnp.inf, level)
    if c.weight == "features":
        inverse = jnp.exp(-level)
        slopes = [_seen_only(x, o) * inverse for x in ds]
        p = _seen_only(s, o) * inverse
        return p, sum(slopes[1:], slopes[0]) if slopes else None
    p = jnp.exp(_logits(c, s, o) - level)
    slopes = []
    if ds:
        slopes.append(_slope(c, "s", s, o, p) * sum(ds[1:], ds[0]))
    for name in o.values:
        if f"d_value {name}" in cut:
            slopes.append(_slope(c, name, s, o, p) * cut[f"d_value {name}"])
    if "d_key_bias" in cut:
        slopes.append(p * _across(_by_rows(cut["d_key_bias"], rows), rows))
    if "d_bias" in cut:
        slopes.append(p * _across(cut["d_bias"], rows))
    return p, sum(slopes[1:], slopes[0]) if slopes else None


def _slope(c: Scores, name: str, s: Any, o: Operands, p: Any) -> Any:
    """Give the derivative of the weight by `name`, relative to the row's sum."""
    if c.expression is None:
        return p
    # A weight of 0 has no gradient: kappa's derivative, not that of log kappa, counts. Where the
    # weight is 0 that of its log may be infinite, and so may that one's.
    none = p == 0
    safe = jnp.where(none, 1.0, s)
    slope = c.expression.derivative(name)({"s": safe, **o.values}, xp)
    return jnp.where(none, 0.0, p * slope)


class _Seen(NamedTuple):
    """What a block sees, in place of a `Visibility`."""

    position: Visibility | None
    key_mask: Any
    mask: Any
    rows: int = 1
    across: bool = False

    def block(self, start: int, stop: int, first: int, last: int) -> Any:
        """Say which queries see which keys; the arguments are those of `Visibility.block`."""
        parts = []
        if self.position is not None:
            v = self.position
            parts.append(v.by_position(0, v.rows, 0, v.keys))
        if self.key_mask is not None:
            parts.append(self.key_mask)
        if self.mask is not None:
            parts.append(self.mask)
        seen = all_of(parts)
        return _across(seen, self.rows) if self.across and seen is not None else seen


def _operands(
    cut: Arrays, visibility: Visibility, whole: bool, *, across: bool = False
) -> Operands:
    """Give what a block reads; the biases of keys are a part of `bias`.

    With `across` what lies along rows and keys has the keys outermost.
    """
    prefix = "value "
    values = {n.removeprefix(prefix): x for n, x in cut.items() if n.startswith(prefix)}
    rows = 1 + cut["q"].ndim - cut["k"].ndim
    key_bias, key_mask = (
        None if (x := cut.get(name)) is None else _by_rows(x, rows)
        for name in ("key_bias", "key_mask")
    )
    bias = cut.get("bias")
    if key_bias is not None:
        bias = key_bias if bias is None else key_bias + bias
    seen: Any = _Seen(None if whole else visibility, key_mask, cut.get("mask"), rows, across)
    if across and bias is not None:
        bias = _across(bias, rows)
    return Operands(cut["q"], cut["k"], cut["v"], None, bias, values, seen)


def _by_rows(x: Any, rows: int) -> Any:
    """Lay an array (..., M) of keys along the axes of rows, of which there may be one of groups."""
    return jnp.expand_dims(x, tuple(range(-1 - rows, -1)))


def _across(x: Any, rows: int) -> Any:
    """Put the keys ahead of the axes of rows."""
    if x.ndim <= rows:  # it is the same for all groups
        x = x[None]
    return jnp.moveaxis(x, -1, -1 - rows)


def _turned(x: Any, rows: int) -> Any:
    """Put the features ahead of the axes of rows, in memory too where there is one head.

    Batched products of arrays that were turned in memory end XLA's CPU compiler (jaxlib 0.10.2)
    inside a conditional: "Check failed: IsMonotonicWithDim0Major".
    """
    turned = jnp.moveaxis(x, -1, -1 - rows)
    return turned if x.ndim > 1 + rows else lax.optimization_barrier(turned)


def _logits(c: Scores, s: Any, o: Operands) -> Any:
    return log_weight(c, s, o, 0, s.shape[-2], 0, s.shape[-1], xp=xp)


def _seen_only(x: Any, o: Operands) -> Any:
    seen = o.visibility.block(0, 0, 0, 0)
    return x if seen is None else jnp.where(seen, x, 0.0)


def _inner(q: Any, k: Any) -> Any:
    """Multiply rows ([G,] R, D) by keys (M, D): one product for all G heads of a key head."""
    if q.ndim == k.ndim:
        return _product(q, k, -1, -1)
    return jnp.einsum("...grd,...md->...grm", q, k, precision=_IN_FULL)


def _times(p: Any, v: Any) -> Any:
    """Multiply weights ([G,] R, M) by values (M, D)."""
    if p.ndim == v.ndim:
        return _product(p, v, -1, -2)
    return jnp.einsum("...grm,...md->...grd", p, v, precision=_IN_FULL)


def _product(a: Any, b: Any, axis: int, other: int) -> Any:
    """Contract an axis of a matrix `a` with one of `b`; einsum may order them less well."""
    lead = tuple(range(a.ndim - 2))
    contracted = (axis % a.ndim,), (other % b.ndim,)
    return lax.dot_general(a, b, (contracted, (lead, lead)), precision=_IN_FULL)
