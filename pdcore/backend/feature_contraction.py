"""The contraction by features, phi(q).sum_j phi(k_j) v_j, in O(N + M), with its pullback.

Under causal, a row sees a prefix of the keys. Whole chunks of the prefix enter by running sums
over chunks; the chunks in which prefixes end are contracted directly, under a mask. Prefix sums
are never subtracted from each other, which would cancel digits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..arrays import device_of, overflow_as_nan, stop_gradient
from ..lowering import Features
from .operands import Operands, blocks

__all__ = ["chunks", "features", "features_vjp", "highest", "prefix_contract"]

CHUNK = 64  # rows and keys of a chunk: the (rows, keys) block costs as much as the state


def features(
    c: Features,
    o: Operands,
    *,
    xp: Any,
    size: int = CHUNK,
    tiled: bool = False,
    contract: Callable[..., tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """Contract by features.

    Parameters
    ----------
    c : Features
        The contraction.
    o : Operands
        The arrays that it reads.
    xp : namespace
        The array-API namespace.
    size : int
        Rows and keys of a chunk.
    tiled : bool
        Whether to cut large matrix products into chunks too, for a library that runs many small
        products faster.
    contract : callable, optional
        A replacement for `prefix_contract`.

    Returns
    -------
    out : array (*B, H, G, N, Dv)
        The normalised sum; for a signed feature map the sum itself.
    L : array (*B, H, G, N)
        The log of the summed weights; 0 for a signed feature map.
    """
    if o.visibility.support.ahead == 0:
        ones = xp.ones_like(o.k[..., :1])  # v may have no columns
        values = xp.concat([o.v, ones], axis=-1)[..., None, :, :]
        k = o.k[..., None, :, :]
        if o.visibility.key_mask is not None:
            real = o.visibility.key_mask[..., None, :, None]
            k = xp.where(real, k, xp.full_like(k, -xp.inf if c.log else 0.0))
        seen, rows = o.visibility, o.q.shape[-2]
        every = o.before is not None and rows == seen.first_prefix(0) == k.shape[-2] == 1
        counts = None if every else seen.prefix_counts(0, rows)
        known: dict[str, Any] = {"log": c.log, "first": o.visibility.first_prefix, "size": size}
        if o.before is not None:
            contract = partial(prefix_contract, before=o.before)
        summed, exponent = (contract or prefix_contract)(o.q, counts, k, values, xp=xp, **known)
        weighted, total = summed[..., :-1], summed[..., -1:]
    else:
        plain, shift = shifted_features(o, xp=xp) if c.log else (o, None)
        k = _real_features(plain, xp)
        products = Products(size if tiled else 0, xp)
        weighted = products.rows(plain.q, products.outer(k, o.v)[..., None, :, :])
        total = xp.matmul(plain.q, xp.sum(k, axis=-2)[..., None, :, None])
        exponent = xp.zeros_like(total) if shift is None else shift[..., None]
    if c.signed:
        return weighted, xp.zeros_like(total[..., 0])
    total = overflow_as_nan(total, xp)
    none = total == 0
    # A quotient, because 1 / total, or its square in the gradient, overflows for small totals.
    out = xp.divide(weighted, xp.where(none, xp.full_like(total, xp.inf), total))
    divisor = xp.where(none, xp.ones_like(total), total)
    level = xp.where(none, xp.full_like(total, -xp.inf), exponent + xp.log(divisor))
    return out, level[..., 0]


class Products:
    """Matrix products with one long axis, whole or cut into chunks of `size`."""

    def __init__(self, size: int, xp: Any) -> None:
        self.size, self.xp = size, xp

    def _cut(self, x: Any) -> tuple[Any, Any]:
        length = x.shape[-2]
        whole = length - length % self.size if self.size else 0
        shape = (*x.shape[:-2], whole // (self.size or 1), self.size, x.shape[-1])
        return self.xp.reshape(x[..., :whole, :], shape), x[..., whole:, :]

    def rows(self, a: Any, b: Any) -> Any:
        """Multiply many rows (..., R, F) by one small matrix (..., F, E)."""
        xp = self.xp
        if a.shape[-2] <= self.size or not self.size:
            return xp.matmul(a, b)
        tiles, rest = self._cut(a)
        main = xp.matmul(tiles, b[..., None, :, :])
        main = xp.reshape(main, (*main.shape[:-3], tiles.shape[-3] * self.size, main.shape[-1]))
        if not rest.shape[-2]:
            return main
        return xp.concat([main, xp.matmul(rest, b)], axis=-2)

    def outer(self, a: Any, b: Any) -> Any:
        """Sum the outer products of rows, a^T b, over (..., R, F) and (..., R, E)."""
        xp = self.xp
        if a.shape[-2] <= self.size or not self.size:
            return xp.matmul(xp.matrix_transpose(a), b)
        (a, a_rest), (b, b_rest) = self._cut(a), self._cut(b)
        total = xp.sum(xp.matmul(xp.matrix_transpose(a), b), axis=-3)
        return total + xp.matmul(xp.matrix_transpose(a_rest), b_rest)


def features_vjp(
    c: Features,
    o: Operands,
    out: Any,
    level: Any,
    d_out: Any,
    d_level: Any,
    *,
    xp: Any,
    size: int = CHUNK,
    tiled: bool = False,
) -> dict[str, Any]:
    """Pull (d_out, d_L) back to ``q``, ``k`` and ``v``, in O(N + M); see `features`."""
    if c.log:
        plain, shift = shifted_features(o, xp=xp)
        d = features_vjp(
            Features(c.kernel),
            plain,
            out,
            level - shift,
            d_out,
            d_level,
            xp=xp,
            size=size,
            tiled=tiled,
        )
        # phi = exp(log phi - shift), and the result does not depend on the shifts.
        return {"q": d["q"] * plain.q, "k": d["k"] * plain.k, "v": d["v"]}
    if c.signed:
        rows = xp.concat([d_out, xp.zeros_like(level)[..., None]], axis=-1)
    else:
        empty = level == -xp.inf
        inverse = xp.where(empty, xp.zeros_like(level), xp.exp(-level))[..., None]
        delta = xp.sum(d_out * out, axis=-1) - xp.where(empty, xp.zeros_like(level), d_level)
        rows = xp.concat([d_out, -delta[..., None]], axis=-1) * inverse
    ones = xp.ones_like(o.k[..., :1])  # v may have no columns
    values = xp.concat([o.v, ones], axis=-1)[..., None, :, :]
    k = _real_features(o, xp)[..., None, :, :]
    if o.visibility.support.ahead == 0:
        dq, dk, dv = _causal_vjp(o, k, values, rows, xp, size)
    else:
        products = Products(size if tiled else 0, xp)
        dq = products.rows(rows, products.outer(values, k))
        state = products.outer(rows, o.q)
        dk = products.rows(values, state)
        dv = products.rows(k, xp.matrix_transpose(state))
    dk, dv = xp.sum(dk, axis=-3), xp.sum(dv[..., :-1], axis=-3)
    if o.visibility.key_mask is not None:
        real = o.visibility.key_mask[..., None]
        dk, dv = (xp.where(real, d, xp.zeros_like(d)) for d in (dk, dv))
    return {"q": dq, "k": dk, "v": dv}


def _causal_vjp(
    o: Operands, k: Any, values: Any, rows: Any, xp: Any, size: int
) -> tuple[Any, Any, Any]:
    """Compute the cotangents of q, k and values under causal, from those of the sums, `rows`."""
    seen = o.visibility
    counts = seen.prefix_counts(0, o.q.shape[-2])
    dq, _ = prefix_contract(rows, counts, values, k, xp=xp, first=seen.first_prefix, size=size)
    # For keys the order is reversed: the rows that see a key are the last ones.
    after = xp.flip(seen.later_rows(), axis=-2)
    late_q, late_rows = xp.flip(o.q, axis=-2), xp.flip(rows, axis=-2)
    step = seen.scale
    dk, _ = prefix_contract(
        xp.flip(values, axis=-2),
        after,
        late_rows,
        late_q,
        xp=xp,
        first=seen.first_later,
        step=step,
        size=size,
    )
    dv, _ = prefix_contract(
        xp.flip(k, axis=-2),
        after,
        late_q,
        late_rows,
        xp=xp,
        first=seen.first_later,
        step=step,
        size=size,
    )
    return dq, xp.flip(dk, axis=-2), xp.flip(dv, axis=-2)


def shifted_features(o: Operands, *, xp: Any) -> tuple[Operands, Any]:
    """Turn log features into features, after subtracting maxima.

    Returns
    -------
    operands : Operands
        Operands with phi(q) and phi(k) of at most 1.
    shift : array (*B, H, G, N)
        What was subtracted from the log kappa of each row.
    """
    k = o.k
    if o.visibility.key_mask is not None:
        real = o.visibility.key_mask[..., None]
        k = xp.where(real, k, xp.full_like(k, -xp.inf))
    top = highest(k, xp)
    q = o.q + top[..., None, :, :]
    shift = stop_gradient(xp.max(q, axis=-1, keepdims=True), xp)
    plain = o._replace(q=xp.exp(q - shift), k=xp.exp(k - top))
    return plain, shift[..., 0]


def highest(k: Any, xp: Any) -> Any:
    """Return the largest log features of keys (..., M, F), as (..., 1, F); 0 in place of -inf."""
    if not k.shape[-2]:
        return xp.sum(k, axis=-2, keepdims=True)
    return _finite(stop_gradient(xp.max(k, axis=-2, keepdims=True), xp), xp)


def _finite(top: Any, xp: Any) -> Any:
    return xp.where(top == -xp.inf, xp.zeros_like(top), top)


def _real_features(o: Operands, xp: Any) -> Any:
    mask = o.visibility.key_mask
    return o.k if mask is None else xp.where(mask[..., None], o.k, xp.zeros_like(o.k))


def prefix_contract(
    a: Any,
    counts: Any,
    k: Any,
    v: Any,
    *,
    xp: Any,
    first: Callable[[int], int | None],
    log: bool = False,
    step: int = 1,
    size: int = CHUNK,
    before: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """Compute sum_{j < c_i} (a_i . k_j) v_j for every row i.

    Parameters
    ----------
    a : array (*B, H, Ga, R, F)
        Rows.
    counts : integer array (R, 1) or (*B, 1, 1, R, 1), or None
        c, the number of keys that a row sees; grows by at most `step` from row to row. None for a
        single row that sees a single key, after sums `before` it.
    k : array (*B, H, Gk, M, F)
        Keys; Ga and Gk are equal, or one of them is 1.
    v : array (*B, H, Gk, M, E)
        Values.
    xp : namespace
        The array-API namespace.
    first : callable
        Returns the count of a row as a Python int; None where only an array holds the count.
    log : bool
        Whether `a` and `k` are logarithms; a running maximum is then subtracted from `k`.
    step : int
        See `counts`.
    size : int
        Rows and keys of a chunk.
    before : tuple of array, optional
        Sums over keys before these, which every row sees, see `operands.Carried`.

    Returns
    -------
    summed : array (*B, H, G, R, E)
    exponent : array (*B, H, G, R, 1)
        The sum is ``summed * exp(exponent)``.
    """
    if before is not None and 0 < k.shape[-2] <= size and a.shape[-2] <= size:
        seen = None
        if counts is not None:
            seen = xp.arange(k.shape[-2], dtype=xp.int64, device=device_of(k)) < counts
        sums, running = (None if x is None else x[..., None, :, :] for x in before)
        return _block(a, k, v, seen, sums, running, xp)
    k, v = chunks(k, size, -xp.inf if log else 0.0, step, xp), chunks(v, size, 0.0, step, xp)
    states, tops = _running(k, v, log, xp, before)
    if not a.shape[-2]:
        summed = xp.matmul(a, states[..., 0, :, :])
        return summed, xp.zeros_like(summed[..., :1])
    outs, exponents = [], []
    for start, stop in blocks(0, a.shape[-2], size):
        count = counts[..., start:stop, :]
        at = _Chunk(count, size, step + 1, first(start), xp)
        keys, running = at.window(k), at.state(tops) if log else None
        seen = at.seen(count, keys.shape[-2])
        x, state = a[..., start:stop, :], at.state(states)
        out, exponent = _block(x, keys, at.window(v), seen, state, running, xp)
        outs.append(out)
        exponents.append(exponent)
    return xp.concat(outs, axis=-2), xp.concat(exponents, axis=-2)


def _block(x: Any, k: Any, v: Any, seen: Any, state: Any, running: Any, xp: Any) -> tuple[Any, Any]:
    """Contract rows with the sums before some keys, and with those of the keys that they see.

    `running` is the maximum that the sums of log features are relative to, otherwise None.
    """
    if running is not None:
        # Not `highest`: its 0 in place of -inf would exceed very negative log features.
        top = xp.maximum(running, xp.max(k, axis=-2, keepdims=True))
        top = _finite(stop_gradient(top, xp), xp)
        x = x + top
        exponent = stop_gradient(xp.max(x, axis=-1, keepdims=True), xp)
        x, k = xp.exp(x - exponent), xp.exp(k - top)
        state = state * xp.matrix_transpose(xp.exp(running - top))
    else:
        exponent = xp.zeros_like(x[..., :1])
    w = xp.matmul(x, xp.matrix_transpose(k))
    w = w if seen is None else xp.where(seen, w, xp.zeros_like(w))
    summed = xp.matmul(x, state) + xp.matmul(w, v)
    return summed, exponent + xp.zeros_like(summed[..., :1])


def chunks(x: Any, size: int, fill: float, step: int, xp: Any) -> Any:
    """Cut rows into chunks (..., C, size, F), followed by `step` + 1 chunks of `fill`."""
    *lead, length, dim = x.shape
    count = -(-length // size) + step + 1
    rest = (
        xp.zeros_like(x[..., :1, :])
        if length
        else xp.zeros((*lead, 1, dim), dtype=x.dtype, device=device_of(x))
    )
    shape = (*lead, count * size - length, dim)
    padded = xp.concat([x, xp.broadcast_to(xp.full_like(rest, fill), shape)], axis=-2)
    return xp.reshape(padded, (*lead, count, size, dim))


def _running(
    k: Any, v: Any, log: bool, xp: Any, before: tuple[Any, Any] | None = None
) -> tuple[Any, Any]:
    """Sum k_j v_j over the chunks before each chunk; with `log`, return the running maximum too.

    The running maximum is -inf for the first chunk. Sums `before` all chunks are added to all.
    """
    if not log:
        sums = xp.matmul(xp.matrix_transpose(k), v)
        sums = xp.cumulative_sum(sums, axis=-3)
        sums = xp.concat([xp.zeros_like(sums[..., :1, :, :]), sums[..., :-1, :, :]], axis=-3)
        return sums if before is None else sums + before[0][..., None, None, :, :], None
    top = xp.zeros_like(k[..., 0, :1, :]) - xp.inf
    state = xp.matmul(xp.matrix_transpose(k[..., 0, :0, :]), v[..., 0, :0, :])
    if before is not None:
        state, top = (
            before[0][..., None, :, :] + state,
            before[1][..., None, :, :] + xp.zeros_like(top),
        )
    states, tops = [], []
    for chunk in range(k.shape[-3]):
        states.append(state)
        tops.append(top)
        block = k[..., chunk, :, :]
        higher = stop_gradient(xp.maximum(top, xp.max(block, axis=-2, keepdims=True)), xp)
        base = _finite(higher, xp)
        state = state * xp.matrix_transpose(xp.exp(top - base))
        state = state + xp.matmul(xp.matrix_transpose(xp.exp(block - base)), v[..., chunk, :, :])
        top = higher
    return xp.stack(states, axis=-3), xp.stack(tops, axis=-3)


class _Chunk:
    """The chunks in which the prefixes of a block of rows end: `width` chunks in sequence."""

    def __init__(self, counts: Any, size: int, width: int, first: int | None, xp: Any) -> None:
        self.size, self.width, self.xp = size, width, xp
        self.at: Any = counts[..., :1, :] // size if first is None else first // size

    def _gather(self, x: Any, width: int) -> Any:
        xp = self.xp
        if isinstance(self.at, int):
            return x[..., self.at : self.at + width, :, :]
        index = (
            xp.arange(width, dtype=xp.int64, device=device_of(x))[:, None, None]
            + self.at[..., None]
        )
        index = xp.broadcast_to(index, (*x.shape[:-3], width, *x.shape[-2:]))
        return xp.take_along_axis(x, index, axis=-3)

    def window(self, x: Any) -> Any:
        """Return the rows of the chunks, joined."""
        cut = self._gather(x, self.width)
        return self.xp.reshape(cut, (*cut.shape[:-3], cut.shape[-3] * cut.shape[-2], cut.shape[-1]))

    def state(self, x: Any) -> Any:
        """Return the running state before the first of the chunks."""
        return self._gather(x, 1)[..., 0, :, :]

    def seen(self, counts: Any, length: int) -> Any:
        """Return which keys of the window each row sees, as a boolean array."""
        index = self.xp.arange(length, dtype=self.xp.int64, device=device_of(counts))
        return index + self.at * self.size < counts
