"""The contraction by scores in array-API calls: blocked, functional, with its pullback.

Shapes: queries (*B, H, G, N, D), with the G query heads of a key head on an axis; keys and values
(*B, H, M, D) and (*B, H, M, Dv); L (*B, H, G, N). No array is written in place and no branch
depends on an array's values, so a framework can trace and differentiate these functions.
"""

from __future__ import annotations

import math
from typing import Any

from ..arrays import constant, overflow_as_nan, stop_gradient
from ..lowering import Scores, sum_to
from ..spec import Visibility
from .feature_contraction import shifted_features
from .log_kappa import inputs, log_weight
from .operands import Operands, blocks
from .tables import entry_sums

__all__ = [
    "ORDINARY",
    "divide",
    "finite",
    "relative_features",
    "scores",
    "scores_vjp",
    "with_overflow",
]

#: A log kappa beyond this is not of ordinary size, see `with_overflow`.
ORDINARY = 1e4


def key_blocks(visibility: Visibility, start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Return the key blocks, of a fixed grid, that queries ``start:stop`` may see."""
    first, last = visibility.key_range(start, stop)
    return [b for b in blocks(0, visibility.keys, size) if b[1] > first and b[0] < last]


def scores(
    c: Scores, o: Operands, *, xp: Any, query_block: int = 256, key_block: int = 512
) -> tuple[Any, Any]:
    """Contract by scores: an online softmax over key blocks, or a plain sum of weights.

    Returns
    -------
    out : array (*B, H, G, N, Dv)
    L : array (*B, H, G, N)
        The log of the summed weights over the visible keys, -inf where it is 0.
    """
    outs, sums, reach = [], [], _reach(o.k, xp)
    for start, stop in blocks(0, o.q.shape[-2], query_block) or [(0, 0)]:
        out, total = _score_rows(c, o, start, stop, key_block, reach, xp)
        outs.append(out)
        sums.append(total)
    return xp.concat(outs, axis=-2), xp.concat(sums, axis=-1)


def _score_rows(
    c: Scores, o: Operands, start: int, stop: int, key_block: int, reach: Any, xp: Any
) -> tuple[Any, Any]:
    q = o.q[..., start:stop, :]
    total = xp.sum(xp.zeros_like(q), axis=-1, keepdims=True)
    peak = total - xp.inf
    value = o.v[..., None, :0, :]
    summed = xp.matmul(total[..., :0], value)
    for first, last in key_blocks(o.visibility, start, stop, key_block):
        k, v = o.k[..., None, first:last, :], o.v[..., None, first:last, :]
        if c.weight == "log":
            s = xp.matmul(q, xp.matrix_transpose(k))
            logits = log_weight(c, s, o, start, stop, first, last, xp=xp)
            higher = xp.maximum(peak, xp.max(logits, axis=-1, keepdims=True))
            base = finite(higher, xp)
            p = xp.exp(logits - base)
        else:
            rows, keys, exponent = relative_features(c, q, k, xp=xp)
            p = xp.matmul(rows, xp.matrix_transpose(keys))
            seen = o.visibility.block(start, stop, first, last)
            if seen is not None:
                p = xp.where(seen, p, xp.zeros_like(p))
            higher = xp.maximum(peak, exponent)
            base = finite(higher, xp)
            p = p * xp.exp(exponent - base)
        shrink = xp.exp(peak - base)
        total = total * shrink + xp.sum(p, axis=-1, keepdims=True)
        if o.dropout is not None:
            p = p * o.dropout.factors(start, stop, first, last, p, xp=xp)
        summed = summed * shrink + xp.matmul(p, v)
        peak = higher
    if c.signed:
        # Only feature maps without a log domain are signed, so every exponent was 0.
        return summed, xp.zeros_like(total[..., 0])
    if c.weight == "log" and reach is not None:
        total = with_overflow(c, total, peak, q, reach, xp=xp)
    return divide(summed, total, finite(peak, xp), xp=xp)


def _reach(k: Any, xp: Any) -> Any:
    """Return the largest |k| of each feature, (*B, H, 1, 1, D), for `with_overflow`."""
    if not k.shape[-2]:
        return None
    return constant(xp.max(xp.abs(k), axis=-2, keepdims=True), xp)[..., None, :, :]


def with_overflow(c: Scores, total: Any, peak: Any, q: Any, reach: Any, *, xp: Any) -> Any:
    """Replace by NaN the sums of weights from which an overflow may have hidden a key.

    Such a product is -inf, whatever the sum of its terms would be. So a row may be zero, or have
    lost its nearest key, where |q|.reach or tau |q|.reach is infinite. Where log kappa is linear in
    q.k, this is of no account in a row whose largest log kappa is of ordinary size.

    Parameters
    ----------
    c : Scores
        The contraction, by log kappa.
    total, peak : array (..., R, 1)
        The sums of weights, and the largest log kappa.
    q : array (..., R, D)
        Queries.
    reach : array broadcastable to (..., 1, D)
        The largest |k| of each feature.
    xp : namespace
        The array-API namespace.
    """
    bound = xp.matmul(xp.abs(constant(q, xp)), xp.matrix_transpose(reach))
    bound = max(1.0, abs(c.scale)) * bound  # the scale may come before the product or after it
    lost = ~(bound < math.inf)
    if c.expression is None:
        lost = lost & ((total == 0) | (xp.abs(constant(peak, xp)) > ORDINARY))
    return xp.where(lost, xp.full_like(total, math.nan), total)


def relative_features(c: Scores, q: Any, k: Any, *, xp: Any) -> tuple[Any, Any, Any]:
    """Compute phi(q), phi(k) and e such that the weight is phi(q).phi(k) exp(e), no overflow."""
    if c.weight == "features":
        return q, k, xp.sum(xp.zeros_like(q), axis=-1, keepdims=True)
    top = stop_gradient(xp.max(k, axis=-2, keepdims=True), xp)
    shifted = q + top
    exponent = stop_gradient(xp.max(shifted, axis=-1, keepdims=True), xp)
    return xp.exp(shifted - exponent), xp.exp(k - top), exponent


def divide(summed: Any, total: Any, exponent: Any, *, xp: Any) -> tuple[Any, Any]:
    """Compute (out, L) from weighted sums: zeros and -inf where the weights sum to 0."""
    total = overflow_as_nan(total, xp)
    none = total == 0
    divisor = xp.where(none, xp.ones_like(total), total)
    out = xp.where(none, xp.zeros_like(summed), xp.divide(summed, divisor))
    level = xp.where(none, xp.full_like(total, -xp.inf), exponent + xp.log(divisor))
    return out, level[..., 0]


def finite(peak: Any, xp: Any) -> Any:
    """Replace -inf, the maximum of no visible key, by 0: exp(-inf - -inf) is NaN."""
    return xp.where(peak == -xp.inf, xp.zeros_like(peak), peak)


def row_delta(out: Any, level: Any, d_out: Any, d_level: Any, *, xp: Any) -> Any:
    """Compute d_out.out - d_L, which the pullback subtracts from d_out.v of every key of a row."""
    delta = xp.sum(d_out * out, axis=-1)
    return (delta - xp.where(level == -xp.inf, xp.zeros_like(delta), d_level))[..., None]


def weights(c: Scores, o: Operands, level: Any, *, xp: Any, query_block: int = 256) -> Any:
    """Compute every weight of the contraction: an (N, M) array per head.

    Returns
    -------
    array (*B, H, G, N, M)
        Normalised as `out` is.
    """
    if c.weight == "log_features":
        o, shift = shifted_features(o, xp=xp)
        c, level = Scores(weight="features"), level - shift
    keys = o.k.shape[-2]
    parts = []
    for start, stop in blocks(0, o.q.shape[-2], query_block) or [(0, 0)]:
        s = xp.matmul(o.q[..., start:stop, :], xp.matrix_transpose(o.k[..., None, :, :]))
        row = level[..., start:stop, None]
        if c.weight == "log":
            w = xp.exp(log_weight(c, s, o, start, stop, 0, keys, xp=xp) - finite(row, xp))
        else:
            seen = o.visibility.block(start, stop, 0, keys)
            inverse = xp.where(row == -xp.inf, xp.zeros_like(row), xp.exp(-row))
            w = (s if seen is None else xp.where(seen, s, xp.zeros_like(s))) * inverse
        parts.append(w)
    return xp.concat(parts, axis=-2)


def scores_vjp(
    c: Scores,
    o: Operands,
    out: Any,
    level: Any,
    d_out: Any,
    d_level: Any,
    *,
    xp: Any,
    query_block: int = 256,
    key_block: int = 512,
) -> dict[str, Any]:
    """Pull (d_out, d_L) back, computing the weights again block by block.

    Returns
    -------
    dict
        ``q, k, v``, ``key_bias`` and ``bias`` where the operands have them, and one entry per
        name of ``values``.
    """
    if c.weight == "log_features":
        plain, shift = shifted_features(o, xp=xp)
        inner = Scores(weight="features")
        d = scores_vjp(
            inner,
            plain,
            out,
            level - shift,
            d_out,
            d_level,
            xp=xp,
            query_block=query_block,
            key_block=key_block,
        )
        return {**d, "q": d["q"] * plain.q, "k": d["k"] * plain.k}
    delta = (
        xp.zeros_like(level)[..., None]
        if c.signed
        else row_delta(out, level, d_out, d_level, xp=xp)
    )
    steps = _Cotangents(o, xp)
    for start, stop in blocks(0, o.q.shape[-2], query_block):
        q, d_o = o.q[..., start:stop, :], d_out[..., start:stop, :]
        row = (level[..., start:stop, None], delta[..., start:stop, :])
        dq = xp.zeros_like(q)
        for first, last in key_blocks(o.visibility, start, stop, key_block):
            k, v = o.k[..., None, first:last, :], o.v[..., None, first:last, :]
            s = xp.matmul(q, xp.matrix_transpose(k))
            dp = xp.matmul(d_o, xp.matrix_transpose(v))
            kept = None
            if o.dropout is not None:
                kept = o.dropout.factors(start, stop, first, last, dp, xp=xp)
                dp = dp * kept
            p, ds = _weight_vjp(c, o, s, dp, row, steps, (start, stop, first, last), xp)
            if kept is not None:
                p = p * kept
            dq = dq + xp.matmul(ds, k)
            steps.add("k", first, xp.matmul(xp.matrix_transpose(ds), q))
            steps.add("v", first, xp.matmul(xp.matrix_transpose(p), d_o))
        steps.dq.append(dq)
    return steps.result(query_block, key_block)


def _weight_vjp(
    c: Scores,
    o: Operands,
    s: Any,
    dp: Any,
    row: tuple[Any, Any],
    steps: _Cotangents,
    at: tuple[int, int, int, int],
    xp: Any,
) -> tuple[Any, Any]:
    """Compute one block of weights again, and its cotangent with respect to inner products."""
    level, delta = row
    zero = xp.zeros_like(s)
    if c.weight == "features":
        seen = o.visibility.block(*at)
        inverse = xp.where(level == -xp.inf, xp.zeros_like(level), xp.exp(-level))
        w = s if seen is None else xp.where(seen, s, zero)
        ds = (dp - delta) * inverse
        return w * inverse, ds if seen is None else xp.where(seen, ds, zero)
    logits = log_weight(c, s, o, *at, xp=xp)
    p = xp.exp(logits - finite(level, xp))
    p = xp.where(level == -xp.inf, zero, p)
    # A weight of 0 has no gradient: kappa is flat there, although log kappa is not.
    none = p == 0
    dlogit = xp.where(none, zero, p * (dp - delta))
    if o.key_bias is not None:
        steps.add("key_bias", at[2], xp.sum(dlogit, axis=-2)[..., None])
    if o.bias is not None:
        steps.add_bias(at, dlogit)
    if c.expression is None:
        return p, c.scale * dlogit
    arguments = inputs(c, s, o, at, xp=xp)
    for name, value in o.values.items():
        entries = [e for e in c.expression.entries if e.table == name]
        found: list[Any] = entries or [name]
        for of in found:
            slope = c.expression.derivative(of)(arguments, xp)
            block = xp.where(none, zero, dlogit * slope)
            if entries:
                block = entry_sums(of, block, arguments, value.shape, xp=xp)
            steps.add_value(name, block)
    slope = c.expression.derivative("s")(arguments, xp)
    return p, xp.where(none, zero, dlogit * slope)


def sum_in_pairs(parts: list[Any]) -> Any:
    """Sum arrays by a binary tree, in a fixed order."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [*(a + b for a, b in pairs), *parts[len(parts) - len(parts) % 2 :]]
    return parts[0]


class _Cotangents:
    """Sums of cotangents on the grid of blocks, collected without writing in place."""

    def __init__(self, o: Operands, xp: Any) -> None:
        self.o, self.xp = o, xp
        self.dq: list[Any] = []
        self.keys: dict[str, dict[int, Any]] = {"k": {}, "v": {}, "key_bias": {}}
        self.bias: dict[tuple[int, int], Any] = {}
        self.values: dict[str, list[Any]] = {n: [xp.zeros_like(v)] for n, v in o.values.items()}

    def add(self, name: str, first: int, block: Any) -> None:
        """Add a block at key `first`, summed over the query heads of a key head."""
        block = self.xp.sum(block, axis=-3)
        parts = self.keys[name]
        parts[first] = parts[first] + block if first in parts else block

    def add_bias(self, at: tuple[int, int, int, int], block: Any) -> None:
        """Add a block of the bias's cotangent."""
        b = self.o.bias
        rows, keys = b.shape[-2] != 1, b.shape[-1] != 1
        shape = (*b.shape[:-2], block.shape[-2] if rows else 1, block.shape[-1] if keys else 1)
        place = (at[0] if rows else 0, at[2] if keys else 0)
        part = sum_to(block, shape, xp=self.xp)
        self.bias[place] = self.bias[place] + part if place in self.bias else part

    def add_value(self, name: str, block: Any) -> None:
        """Add a block to the cotangent of a scalar per head."""
        self.values[name].append(sum_to(block, self.o.values[name].shape, xp=self.xp))

    def result(self, query_block: int, key_block: int) -> dict[str, Any]:
        """Join the blocks; a block that no query sees is zero."""
        o, xp = self.o, self.xp
        # In pairs: a running sum over many blocks would lose digits.
        grads = {name: sum_in_pairs(parts) for name, parts in self.values.items()}
        grads["q"] = xp.concat(self.dq, axis=-2) if self.dq else xp.zeros_like(o.q)
        grid = blocks(0, o.k.shape[-2], key_block)
        for name, like in (("k", o.k), ("v", o.v), ("key_bias", o.key_bias)):
            if like is None:
                continue
            column = name == "key_bias"
            target = like[..., None] if column else like
            parts = [self.keys[name].get(a, xp.zeros_like(target[..., a:b, :])) for a, b in grid]
            total = xp.concat(parts, axis=-2) if parts else xp.zeros_like(target)
            grads[name] = total[..., 0] if column else total
        if o.bias is not None:
            grads["bias"] = self._bias(query_block, key_block)
        return grads

    def _bias(self, query_block: int, key_block: int) -> Any:
        xp, b = self.xp, self.o.bias
        strips = []
        for start, stop in blocks(0, b.shape[-2], query_block):
            row = [
                self.bias.get((start, first), xp.zeros_like(b[..., start:stop, first:last]))
                for first, last in blocks(0, b.shape[-1], key_block)
            ]
            strips.append(xp.concat(row, axis=-1) if row else b[..., start:stop, :])
        return xp.concat(strips, axis=-2) if strips else xp.zeros_like(b)
