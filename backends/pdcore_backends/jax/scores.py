"""The contraction by scores on JAX: blocks of rows and keys, differentiable to any order.

The derivative is written as a tangent, d_out = sum_j p_j (dl_j v_j + dv_j) - out sum_j p_j dl_j
with p_j = exp(l_j - L), which recomputes p by blocks. JAX transposes the tangent for reverse mode;
`jax.checkpoint` on every block keeps its memory at O(N + M). Because p is computed from the primal
inputs and from L, and L has a tangent too, derivatives of any order, `vmap` and `jvp` follow.
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
    divide,
    dropout,
    finite,
    relative_features,
    score_contraction,
    shifted_features,
)

from .blocks import Arrays, StaticCall, over_heads, over_keys, over_rows, sizes, ungrouped
from .namespace import NAMESPACE as xp
from .namespace import in_full
from .products import (
    BlockVisibility,
    along_rows,
    block_inputs,
    block_logits,
    block_operands,
    block_values,
    features_first,
    keys_first,
    product,
    rows_by_keys,
    visible_only,
    weights_by_values,
)

__all__ = [
    "checkpointed",
    "contract",
    "contract_tangents",
    "divisor",
    "nonzero",
    "prepared",
    "scores",
]

Result = TypeVar("Result")

#: The most rows and keys of a block of packed sequences, which skip those of other segments.
_PACKED = 256


def scores(c: Scores, o: Operands, *, turns: bool) -> tuple[Any, Any]:
    """Contract by scores.

    Parameters
    ----------
    c : Scores
        The contraction.
    o : Operands
        The operands.
    turns : bool
        Whether heads may run one after the other, see `.blocks.sizes`.

    Returns
    -------
    out : array (*B, H, G, N, Dv)
    L : array (*B, H, G, N)
        Both as in `pdcore.extend.scores`.
    """
    if not (o.q.size and o.k.size and o.v.shape[-1]):
        return score_contraction.scores(c, o, xp=xp)
    call, arrays = prepared(c, o, turns=turns)
    out, level = contract(call, arrays)
    return jnp.reshape(out, (*o.q.shape[:-1], -1)), jnp.reshape(level, o.q.shape[:-1])


def prepared(c: Scores, o: Operands, *, turns: bool) -> tuple[StaticCall, Arrays]:
    """Return the static part and the arrays of a contraction, which must not be empty."""
    seen = o.visibility
    *lead, group, rows, _ = o.q.shape
    keys = o.k.shape[-2]
    arrays: Arrays = {"q": o.q, "k": o.k, "v": o.v}
    for name, x in (("key_bias", o.key_bias), ("bias", o.bias), ("key_mask", seen.key_mask)):
        if x is not None:
            arrays[name] = x
    if seen.runs is not None:
        arrays["runs"] = seen.runs[..., None, None, :]
        arrays["key_runs"] = seen.runs[..., None, :]
    if seen.mask is not None:
        arrays["mask"] = seen.by_mask(0, rows, 0, keys)
    if not seen.static:
        arrays["offset"] = jnp.asarray(seen.offset)
    for name, x in o.values.items():
        arrays[f"value {name}"] = jnp.broadcast_to(x, (*lead, *x.shape[-3:]))
    if o.dropout is not None:
        arrays["first_lane"], arrays["second_lane"] = o.dropout.lanes
        arrays["key_index"] = o.dropout.keys(0, keys, xp)
    if seen.labels is not None:
        arrays["q_labels"], arrays["k_labels"] = seen.labels[0], seen.labels[1][..., 0, :]
    if group == 1:
        arrays = ungrouped(arrays)
    restricts = seen.support.restricts
    block = sizes(math.prod(lead), group, rows, keys, turns=turns, restricts=restricts)
    if seen.runs is not None:
        block = block._replace(rows=min(block.rows, _PACKED), keys=min(block.keys, _PACKED))
    call = StaticCall(
        c,
        seen.support,
        rows,
        keys,
        seen.scale,
        seen.offset if seen.static else None,
        block,
        0.0 if o.dropout is None else o.dropout.p,
    )
    return call, arrays


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def contract(call: StaticCall, arrays: Arrays) -> tuple[Any, Any]:
    """Compute (out, L) of a contraction from `prepared`, in the shapes of its arrays."""

    def rows(block: Arrays) -> Arrays:
        return over_rows(call, partial(_forward, call), block)

    results = over_heads(call, rows, arrays)
    return results["out"], results["level"]


class _WeightedSums(NamedTuple):
    """Sums of weighted values and of weights over keys, relative to exp(peak)."""

    values: Any
    total: Any
    peak: Any


def _forward(call: StaticCall, arrays: Arrays, visibility: Visibility, whole: bool) -> Arrays:
    """Contract a block of rows with its visible keys."""
    c, arrays = _scaled(call.contraction, arrays)

    def body(cut: Arrays, seen: Visibility) -> _WeightedSums:
        o = block_operands(cut, seen, whole)
        if c.weight == "log":
            logits = block_logits(c, rows_by_keys(o.q, o.k), o)
            peak = jnp.max(logits, axis=-1, keepdims=True)
            # Without the barrier XLA computes exp twice, for the sum and for the product.
            p = lax.optimization_barrier(jnp.exp(logits - _base(peak)))
        else:
            k = o.k if o.q.ndim == o.k.ndim else o.k[..., None, :, :]
            rows, keys, peak = relative_features(c, o.q, k, xp=xp)
            p = visible_only(rows_by_keys(rows, jnp.reshape(keys, o.k.shape)), o)
        total = jnp.sum(p, axis=-1, keepdims=True)
        return _WeightedSums(weights_by_values(_kept(call, p, cut), o.v), total, peak)

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
    if c.weight == "log":
        reach = jnp.max(jnp.abs(arrays["k"]), axis=-2, keepdims=True)
        if arrays["q"].ndim > reach.ndim:
            reach = reach[..., None, :, :]
        total = score_contraction.with_overflow(c, sums.total, sums.peak, arrays["q"], reach, xp=xp)
        # The total is 0 if no key is visible, otherwise at least 1.
        level = jnp.log(total) + _base(sums.peak)
        total = jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        return {"out": sums.values / total, "level": level[..., 0]}
    out, level = divide(sums.values, sums.total, finite(sums.peak, xp), xp=xp)
    return {"out": out, "level": level}


def _base(peak: Any) -> Any:
    """Return the maximum, finite for rows without visible keys: exp(-inf - -inf) is NaN.

    `finite` is a select, which keeps XLA from computing small heads in one fusion.
    """
    return jnp.maximum(peak, jnp.finfo(peak.dtype).min)


@partial(contract.defjvp, symbolic_zeros=True)
@in_full()
def _contract_jvp(call: StaticCall, primals: tuple[Arrays], tangents: tuple[Arrays]) -> Any:
    [arrays] = primals
    out, level = contract(call, arrays)
    results = {**arrays, "out": out, "level": divisor(level)}
    # The outermost blocks are checkpointed, so that these arrays are the only residuals.
    derivatives = checkpointed(partial(contract_tangents, call), results, nonzero(tangents[0]))
    return (out, level), (derivatives["out"], derivatives["level"])


def divisor(level: Any) -> Any:
    """Return L, in rows without visible keys the largest number in place of -inf.

    Weights are exp(l - L), and 0 in such rows. A derivative keeps this array, which has no inf
    because `jax_debug_infs` rejects inf there.
    """
    return jnp.where(level == -jnp.inf, jnp.finfo(level.dtype).max, level)


def nonzero(tangents: Arrays) -> Arrays:
    """Return the tangents that are not symbolic zeros, by the names ``d_q`` and so on."""
    return {
        f"d_{name}": t
        for name, t in tangents.items()
        if not isinstance(t, SymbolicZero) and t.dtype != jax.dtypes.float0
    }


def contract_tangents(call: StaticCall, arrays: Arrays, moved: Arrays) -> Arrays:
    """Compute the tangents of ``out`` and ``level``; `arrays` contains ``out`` and `divisor`.

    The tangents are sums over keys: if ``out`` and ``level`` are those of all keys, the tangents of
    disjoint sets of keys may be added.
    """
    return _tangents(*_plain(call, arrays, moved))


def checkpointed(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function; a derivative keeps its arguments only."""
    result: Result = jax.checkpoint(function, prevent_cse=False)(*arguments)
    return result


def _plain(call: StaticCall, arrays: Arrays, moved: Arrays) -> tuple[StaticCall, Arrays, Arrays]:
    """Return a contraction of log features as one of features less their maxima, and tangents."""
    c = call.contraction
    if c.weight != "log_features":
        return call, arrays, moved
    q, k = arrays["q"], arrays["k"]
    grouped = q if q.ndim > k.ndim else q[..., None, :, :]
    seen: Any = BlockVisibility(None, arrays.get("key_mask"), None)
    # phi = exp(log phi - shift); the tangents do not depend on the shifts.
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
    if call.sizes.heads is None:
        return rows(both)
    return over_heads(call, partial(checkpointed, rows), both)


def _tangent(call: StaticCall, arrays: Arrays, visibility: Visibility, whole: bool) -> Arrays:
    """Compute the tangents of a block of rows.

    Weights and their factors have the axis of keys before the axes of rows. Derivatives by keys and
    values are products over the rows, which are several times as fast on a CPU if rows are the
    inner axes; the barriers keep XLA from another layout.
    """
    c, arrays = _scaled(call.contraction, arrays)
    rows = 1 + arrays["q"].ndim - arrays["k"].ndim
    level = keys_first(arrays["level"][..., None], rows)

    def body(cut: Arrays, seen: Visibility) -> tuple[Any, Any]:
        p, slope = _linearised(
            c, cut, block_operands(cut, seen, whole, transposed=True), level, rows
        )
        moved = []
        if slope is not None:
            of_values = _kept(call, slope, cut, rows)
            moved.append(product(cut["v"], of_values, -2, -1 - rows))
        if "d_v" in cut:
            moved.append(product(cut["d_v"], _kept(call, p, cut, rows), -2, -1 - rows))
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


def _kept(call: StaticCall, p: Any, cut: Arrays, rows: int = 0) -> Any:
    """Drop weights (..., R, M), or (..., M, [G,] R) for the axes of rows of `_tangent`."""
    if not call.dropout:
        return p
    first, second, keys = (cut[name] for name in ("first_lane", "second_lane", "key_index"))
    first, second, keys = first[..., None], second[..., None], keys
    if rows:
        first, second = (keys_first(x, rows) for x in (first, second))
        keys = keys_first(along_rows(keys, rows), rows)
    least = dropout.threshold(call.dropout)
    seen = dropout.kept((first, second), keys, least, xp=xp)
    return jnp.where(seen, p * (1.0 / (1.0 - call.dropout)), 0.0)


def _scaled(c: Scores, arrays: Arrays) -> tuple[Scores, Arrays]:
    """Scale the queries of a block instead of its scores, which are more numerous."""
    if c.weight != "log" or c.expression is not None:
        return c, arrays
    scaled: Arrays = {n: arrays[n] * c.scale for n in ("q", "d_q") if n in arrays}
    return replace(c, scale=1.0), {**arrays, **scaled}


def _linearised(c: Scores, cut: Arrays, o: Operands, level: Any, rows: int) -> tuple[Any, Any]:
    """Compute the normalised weights of a block, and weights times the tangent of log weight.

    The second is None if no input of the weights has a tangent. Both are (M, [G,] R), see
    `_tangent`.
    """
    ds = []
    if "d_q" in cut:
        ds.append(product(features_first(o.k, 1), features_first(cut["d_q"], rows), -2, -1 - rows))
    q = features_first(o.q, rows)
    if "d_k" in cut:
        ds.append(product(cut["d_k"], q, -1, -1 - rows))
    s = product(o.k, q, -1, -1 - rows)
    if c.weight == "features":
        inverse = jnp.exp(-level)
        slopes = [visible_only(x, o) * inverse for x in ds]
        p = visible_only(s, o) * inverse
        return p, sum(slopes[1:], slopes[0]) if slopes else None
    p = jnp.exp(block_logits(c, s, o) - level)
    slopes = []
    if ds:
        slopes.append(_slope(c, "s", s, o, p) * sum(ds[1:], ds[0]))
    for name in o.values:
        if f"d_value {name}" in cut:
            for of, value in block_values(c, name, cut[f"d_value {name}"], o):
                slopes.append(_slope(c, of, s, o, p) * value)
    if "d_key_bias" in cut:
        slopes.append(p * keys_first(along_rows(cut["d_key_bias"], rows), rows))
    if "d_bias" in cut:
        slopes.append(p * keys_first(cut["d_bias"], rows))
    return p, sum(slopes[1:], slopes[0]) if slopes else None


def _slope(c: Scores, of: Any, s: Any, o: Operands, p: Any) -> Any:
    """Compute the derivative of the weight by an input or entry, relative to the sum of the row."""
    if c.expression is None:
        return p
    # Where kappa is 0 the derivatives of log kappa, of any order, may be infinite; the gradient of
    # the weight is 0 there, as if kappa itself were differentiated.
    zero = p == 0
    safe = jnp.where(zero, 1.0, s)
    slope = c.expression.derivative(of)(block_inputs(c, safe, o), xp)
    return jnp.where(zero, 0.0, p * slope)
