"""The specification executed literally: the oracle that every backend is judged by.

Direct formulas in array-API calls, one head at a time, with (N, M) arrays and no rewrites: no
folding of the normalization into the query, no blocks, no prefix sums. It runs unchanged on any
array library, also on ``numpy.longdouble``, and is differentiable by a framework's autodiff: no
in-place writes, no branch on an array's values, and both branches of a `where` are finite
wherever a gradient could otherwise be NaN. It is never fast.

Notation: B leading axes, N queries, M keys, W keys after pooling, D and Dv features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import kernels
from .errors import UnsupportedError
from .instance_enhanced import InstanceEnhanced
from .mixture import Mixture
from .normalization import Batch, Identity
from .reference_inputs import Call, hook_params, prepare, select
from .reference_normalizations import instance_enhanced, mixture, moments
from .spec import AttentionSpec

__all__ = ["reference_attention", "reference_weights"]

INF = math.inf


def reference_attention(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec = "softmax",
    *,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    params: Mapping[str, Any] | None = None,
    return_lse: bool = False,
    round_intermediates: Any = None,
) -> Any:
    """Compute an attention by its formulas: f(x) = sum_j v_j kappa(x, k_j) / h(x).

    A NaN or inf reaches exactly the rows that see it: directly, through a pooled key, or through
    a statistic. 16-bit inputs are computed in float32 and rounded once, at the end. Gradients by
    a framework's autodiff are those of kappa, and never NaN for finite inputs; the running `mean`
    and `var` are not detached, which array-API calls cannot say. Matrix products have the
    precision that the library is set to.

    Parameters
    ----------
    q : array (*B, Hq, N, D)
        Queries, float16, bfloat16, float32, float64 or NumPy's longdouble.
    k : array (*B, Hkv, M, D)
        Keys; query head i uses key head ``i // (Hq // Hkv)``.
    v : array (*B, Hkv, M, Dv)
        Values.
    spec : str or AttentionSpec
        What to compute.
    mask : bool array broadcastable to (*B, Hq, N, M), optional
        True where a query may attend to a key; a pooled key needs it for all its real keys.
    key_mask : bool array (*B, M), optional
        True for a real key.
    bias : float array broadcastable to (*B, Hq, N, M), optional
        Added to log kappa; -inf removes the key, from ``h(count)`` too.
    offset : int, integer array () or (*B,), or "end"
        The position of query 0; ``"end"`` puts the last query on the last real key.
    params : mapping of str to array, optional
        The arrays that the spec's kernel and normalization declare.
    return_lse : bool
        Return log h too.
    round_intermediates : dtype, optional
        A 16-bit dtype of the arrays' library. T(q), T(k), the weights kappa / h and the result
        are rounded to it while sums stay in float32: the least error of an honest 16-bit
        implementation.

    Returns
    -------
    out : array (*B, Hq, N, Dv)
        In the dtype of `q`. A row without a visible key is zero.
    lse : array (*B, Hq, N)
        With `return_lse`: log sum kappa, log n or 0 for h = sum, count or one; -inf in a row that
        sees no key, and for sum in a row whose kernel values are all 0. float32 for 16-bit inputs.

    Raises
    ------
    TypeError, ValueError
        When the arguments do not fit each other or the spec.
    UnsupportedError
        For a bias with pooled keys, or with a kernel that has no logarithm.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.zeros((1, 1, 3)), np.zeros((1, 2, 3))  # kappa = 1 for both keys
    >>> v = np.asarray([[[1.0], [3.0]]])
    >>> print(reference_attention(q, k, v))
    [[[2.]]]
    """
    # Only NumPy warns: of overflow, of log 0, and of the NaN that a caller may have put in.
    with np.errstate(all="ignore"):
        call = prepare(q, k, v, spec, mask, key_mask, bias, offset, params, round_intermediates)
        xp = call.xp
        outs, lses = [], []
        for head in _heads(call):
            outs.append(_contract(head.weights, head.visible, head.values, xp))
            lses.append(head.lse)
        out = xp.astype(call.rounded(xp.stack(outs, axis=-3)), q.dtype)
        return (out, xp.stack(lses, axis=-2)) if return_lse else out


def reference_weights(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec = "softmax",
    *,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    params: Mapping[str, Any] | None = None,
    round_intermediates: Any = None,
) -> Any:
    """Compute the weights kappa / h of an attention over the keys as given.

    Parameters
    ----------
    q, k, v, spec, mask, key_mask, bias, offset, params, round_intermediates
        As in `reference_attention`.

    Returns
    -------
    array (*B, Hq, N, M)
        In the dtype of `q`. The weight of a pooled key is spread evenly over the real keys that
        it covers (``pool=first``: it stays on the first), so ``weights @ v`` is the attention.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As in `reference_attention`.
    """
    with np.errstate(all="ignore"):
        call = prepare(q, k, v, spec, mask, key_mask, bias, offset, params, round_intermediates)
        xp = call.xp
        spread = []
        for head in _heads(call):
            chosen = head.chosen[..., None, :, :]
            count = xp.sum(xp.astype(chosen, call.dtype), axis=-1, keepdims=True)
            share = head.weights[..., None] / select(count > 0, count, 1.0, xp)
            share = select(chosen, share, 0.0, xp)
            *lead, windows, scale = share.shape
            spread.append(xp.reshape(share, (*lead, windows * scale))[..., : k.shape[-2]])
        return xp.astype(xp.stack(spread, axis=-3), q.dtype)


@dataclass(frozen=True)
class _Head:
    """One query head: its weights over the pooled keys, and what they are taken of."""

    weights: Any  # (*B, N, W), 0 where not visible
    visible: Any  # bool (*B, N, W)
    lse: Any  # (*B, N)
    values: Any  # pooled, (*B, W, Dv)
    chosen: Any  # bool (*B, W, s): the keys that a pooled key is the mean of


def _heads(call: Call) -> Iterator[_Head]:
    """Go through the query heads in order."""
    xp, spec = call.xp, call.spec
    key_heads = call.k.shape[-3]
    group = call.q.shape[-3] // key_heads
    for g in range(key_heads):
        scale = spec.heads.scales[g] if spec.heads.scales else 1
        member = _cut(call.real[..., None], scale, call)[..., 0]
        chosen = member
        if spec.heads.pool == "first":
            order = xp.cumulative_sum(xp.astype(member, call.dtype), axis=-1)
            chosen = member & (order == 1)
        keys = _pool(call.k[..., g, :, :], chosen, call)
        values = _pool(call.v[..., g, :, :], chosen, call)
        real = xp.any(member, axis=-1)
        params = {name: value[g : g + 1, ...] for name, value in call.params.items()}
        # A pooled key occupies its nominal window, though its last positions may not exist.
        first = xp.arange(real.shape[-1], device=call.device) * scale
        allowed = _allowed_by_position(call, first, first + (scale - 1))
        allowed = allowed & real[..., None, :]
        # Prefix statistics: mask and window do not restrict them.
        counted = (first + (scale - 1) <= call.position) & real[..., None, :]
        transform = None if spec.prefix else _transform(call, keys, real, params)
        y = keys if transform is None else call.rounded(transform(keys))
        for i in range(g * group, (g + 1) * group):
            visible = allowed
            if call.mask is not None:
                mask = _cut(xp.matrix_transpose(call.mask[..., i, :, :]), scale, call)
                denied = xp.any(~mask & member[..., None], axis=-2)
                visible = visible & ~xp.matrix_transpose(denied)
            bias = None
            if call.bias is not None:
                bias = call.bias[..., i, :, :]
                visible = visible & (bias != -INF)
            query = call.q[..., i, :, :]
            if transform is None:
                visible = visible & xp.any(counted, axis=-1, keepdims=True)
                inner = _prefix_inner_products(call, query, keys, counted, params)
                has_log, kappa = True, _pointwise(spec.kernel, inner, visible, call, params)
            else:
                x = call.rounded(transform(query))
                has_log, kappa = _kappa(spec.kernel, x, y, visible, call, params)
            if bias is not None:
                kappa = kappa + bias
            weights, lse = _normalise(kappa, has_log, visible, spec.normaliser, xp)
            yield _Head(call.rounded(weights), visible, lse, values, chosen)


def _allowed_by_position(call: Call, first: Any, last: Any) -> Any:
    """Apply causal and window: all of the span first..last of a key must be allowed."""
    position, support = call.position, call.spec.support
    shape = (*position.shape[:-1], first.shape[0])
    allowed = call.xp.ones(shape, dtype=call.xp.bool, device=call.device)
    if support.causal:
        allowed = allowed & (last <= position)
    if support.left != INF:
        allowed = allowed & (first >= position - int(support.left))
    if support.right != INF:
        allowed = allowed & (last <= position + int(support.right))
    return allowed


# --- head scaling -----------------------------------------------------------------------------


def _cut(x: Any, scale: int, call: Call) -> Any:
    """Cut rows (*B, M, D) into the windows of head scaling, (*B, W, s, D), zeros at the end."""
    xp = call.xp
    *lead, length, dim = x.shape
    windows = -(-length // scale)
    missing = xp.zeros((*lead, windows * scale - length, dim), dtype=x.dtype, device=call.device)
    return xp.reshape(xp.concat([x, missing], axis=-2), (*lead, windows, scale, dim))


def _pool(x: Any, chosen: Any, call: Call) -> Any:
    """Take the mean over the chosen keys of each window, (*B, W, D); 0 where there is none."""
    xp = call.xp
    chosen = chosen[..., None]
    count = xp.sum(xp.astype(chosen, call.dtype), axis=-2)
    total = xp.sum(select(chosen, _cut(x, chosen.shape[-2], call), 0.0, xp), axis=-2)
    return total / select(count > 0, count, 1.0, xp)


# --- normalization ----------------------------------------------------------------------------


def _transform(call: Call, keys: Any, real: Any, params: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Give T for one head, from its pooled keys (*B, W, D); real (*B, W)."""
    xp, normalization = call.xp, call.spec.normalization
    if type(normalization) is Identity:
        return lambda x: x
    if type(normalization) is Batch:
        if normalization.statistics == "running":
            mean, var = params["mean"], params["var"]
        else:
            axes = tuple(range(keys.ndim - 1)) if normalization.statistics == "batch" else -2
            mean, var = moments(keys, real[..., None], axes, xp)
        beta = _beta(normalization, call, params)
        return lambda x: (x - beta * mean) / xp.sqrt(var + normalization.eps)

    if type(normalization) is InstanceEnhanced:
        return instance_enhanced(normalization, keys, real, params, xp)
    if type(normalization) is Mixture:
        return mixture(normalization, keys, real, xp)

    # A user's normalization, by its public hooks: arrays with a head axis of length 1.
    state: Mapping[str, Any] = {}
    statistics = normalization.statistics_state()
    if statistics is not None:
        previous = None
        block, mask = keys[..., None, :, :], real[..., None, :, None]
        for _ in range(statistics.rounds):
            state = statistics.of(block, mask, xp=xp, previous=previous)
            state = previous = statistics.finalize(state, xp=xp)
    own = hook_params(normalization, call, params)
    return lambda x: normalization.apply(
        x[..., None, :, :], state, xp=xp, params=own
    )[..., 0, :, :]  # fmt: skip


def _beta(normalization: Batch, call: Call, params: Mapping[str, Any]) -> Any:
    """Give the weight of the mean, (D,)."""
    dim = call.q.shape[-1]
    if normalization.beta != "param":
        return call.xp.full((dim,), normalization.beta, dtype=call.dtype, device=call.device)
    return call.xp.broadcast_to(params["beta"][0, ...], (dim,))


def _prefix_inner_products(
    call: Call, q: Any, keys: Any, counted: Any, params: Mapping[str, Any]
) -> Any:
    """Compute T_p(x).T_p(y) for a query at position p and every key y, (*B, N, W).

    T_p has the moments of the keys that are `counted`, bool (*B, N, W), in the query's row.
    """
    xp, normalization = call.xp, call.spec.normalization
    if type(normalization) is not Batch:
        raise UnsupportedError(f"{normalization.word}: no formula for its prefix statistics")
    beta = _beta(normalization, call, params)
    inner = xp.zeros(counted.shape, dtype=call.dtype, device=call.device)
    for d in range(q.shape[-1]):
        x, y = q[..., d][..., :, None], keys[..., d][..., None, :]
        mean, var = moments(xp.broadcast_to(y, counted.shape), counted, -1, xp)
        centre, deviation = beta[d] * mean, xp.sqrt(var + normalization.eps)
        x, y = (x - centre) / deviation, (y - centre) / deviation
        inner = inner + call.rounded(x) * call.rounded(y)
    return inner


# --- kernels ----------------------------------------------------------------------------------


def _kappa(
    kernel: kernels.Kernel, x: Any, y: Any, visible: Any, call: Call, params: Mapping[str, Any]
) -> tuple[bool, Any]:
    """Evaluate a kernel on every pair of rows.

    Returns
    -------
    has_log : bool
        Whether the second entry is log kappa, else it is kappa.
    array (*B, N, W)
    """
    xp = call.xp
    if type(kernel) is kernels.Gaussian:
        square = xp.zeros(visible.shape, dtype=call.dtype, device=call.device)
        for d in range(x.shape[-1]):
            difference = x[..., d][..., :, None] - y[..., d][..., None, :]
            square = square + difference * difference
        return True, -kernel.gamma * square
    if type(kernel) is kernels.Cosine:
        return True, kernel.scale * _inner(_unit(x, xp), _unit(y, xp), xp)
    if type(kernel) is kernels.RandomFeatures:
        dim = x.shape[-1]
        tau = _tau(kernel.scale, dim)
        drawn = np.random.RandomState(kernel.seed).standard_normal((kernel.count, dim))
        omega = xp.asarray(drawn, dtype=call.dtype, device=call.device)

        def log_phi(z: Any) -> Any:
            square = xp.sum(z * z, axis=-1, keepdims=True)
            projected = math.sqrt(tau) * _inner(z, omega, xp)
            return projected - tau / 2 * square - math.log(kernel.count) / 2

        return True, _log_sum_of_products(log_phi(x), log_phi(y), xp)
    if type(kernel) is kernels.Elu:
        return False, _inner(_elu_plus_one(x, xp), _elu_plus_one(y, xp), xp)
    if type(kernel) is kernels.Relu:
        # x <= 0, not x > 0: a NaN must come through. The gradient at 0 is 0.
        zero = xp.zeros_like
        x, y = xp.where(x <= 0, zero(x), x), xp.where(y <= 0, zero(y), y)
        return False, _inner(x, y, xp)
    if isinstance(kernel, kernels.FeatureMap):
        own = hook_params(kernel, call, params)
        phi_x, phi_y = (
            kernel.features(z[..., None, :, :], xp=xp, params=own)[..., 0, :, :] for z in (x, y)
        )
        if kernel.log_domain:
            return True, _log_sum_of_products(phi_x, phi_y, xp)
        return False, _inner(phi_x, phi_y, xp)
    return True, _pointwise(kernel, _inner(x, y, xp), visible, call, params)


def _pointwise(
    kernel: kernels.Kernel, s: Any, visible: Any, call: Call, params: Mapping[str, Any]
) -> Any:
    """Evaluate log kappa from s = x.y, (*B, N, W)."""
    xp = call.xp
    dim = call.q.shape[-1]
    if type(kernel) is kernels.Exponential:
        z = _tau(kernel.scale, dim) * s
        return z if kernel.softcap is None else kernel.softcap * xp.tanh(z / kernel.softcap)
    if type(kernel) is kernels.Polynomial:
        base = _tau(kernel.scale, dim) * s + kernel.coef0
        zero = base == 0
        log = kernel.degree * xp.log(xp.abs(select(zero, xp.ones_like(base), base, xp)))
        return select(zero, xp.full_like(log, -INF), log, xp)
    if not isinstance(kernel, kernels.PointwiseKernel):
        raise UnsupportedError(
            f"{kernel.word}: the reference has no formula for it, as {type(kernel).__name__} is "
            "neither a PointwiseKernel nor a FeatureMap"
        )

    def log_kappa(s: Any) -> Any:
        values = {"s": s, **{p.name: params[p.name][0, ...] for p in kernel.parameters()}}
        return xp.zeros_like(s) + kernel.expression(dim)(values, xp)

    if 0 in s.shape:
        return xp.zeros_like(s)
    # Where kappa = 0, the derivative of its log is not finite. Evaluate those entries, and the
    # ones that nobody sees, at an s from elsewhere; the select then gives them gradient 0.
    log = log_kappa(s)
    good = visible & xp.isfinite(log)
    column = xp.full((*s.shape[:-1], 1), -INF, dtype=s.dtype, device=call.device)
    spare = xp.max(xp.concat([select(good, s, -INF, xp), column], axis=-1))
    spare = select(spare == -INF, xp.ones_like(spare), spare, xp)
    safe = visible & (log != -INF)
    return select(safe, log_kappa(xp.where(safe, s, spare)), -INF, xp)


def _inner(x: Any, y: Any, xp: Any) -> Any:
    return xp.matmul(x, xp.matrix_transpose(y))


def _unit(x: Any, xp: Any) -> Any:
    """Divide rows by their length; a zero row stays zero and has gradient 0."""
    square = xp.sum(x * x, axis=-1, keepdims=True)
    zero = square == 0
    return select(zero, xp.zeros_like(x), x / xp.sqrt(select(zero, 1.0, square, xp)), xp)


def _elu_plus_one(x: Any, xp: Any) -> Any:
    negative = x <= 0
    return xp.where(negative, xp.exp(select(negative, x, 0.0, xp)), x + 1.0)


def _log_sum_of_products(log_x: Any, log_y: Any, xp: Any) -> Any:
    """Compute log sum_f exp(log_x_f + log_y_f) for every pair of rows, feature by feature."""
    features = range(log_x.shape[-1])

    def term(f: int) -> Any:
        return log_x[..., f][..., :, None] + log_y[..., f][..., None, :]

    top = xp.full_like(_inner(log_x, log_y, xp), -INF)
    for f in features:
        top = xp.maximum(top, term(f))
    top = select(top == -INF, 0.0, top, xp)
    total = xp.zeros_like(top)
    for f in features:
        total = total + xp.exp(term(f) - top)
    zero = total == 0
    return select(zero, -INF, top + xp.log(select(zero, 1.0, total, xp)), xp)


def _tau(scale: float | None, dim: int) -> float:
    return scale if scale is not None else 1.0 / math.sqrt(max(dim, 1))


# --- normaliser and contraction ---------------------------------------------------------------


def _normalise(
    kappa: Any, has_log: bool, visible: Any, normaliser: str, xp: Any
) -> tuple[Any, Any]:
    """Divide kappa, given as its logarithm if `has_log`, by h.

    Returns
    -------
    weights : array (*B, N, W)
        0 where not visible, and in rows where h is 0.
    lse : array (*B, N)
        log h.
    """
    seen = xp.sum(xp.astype(visible, kappa.dtype), axis=-1, keepdims=True)
    top, used = xp.zeros_like(seen), visible
    if has_log:
        used = visible & (kappa != -INF)
        if normaliser == "sum":
            # The column of -inf gives a row without keys a maximum.
            logs = [select(used, kappa, -INF, xp), xp.full_like(seen, -INF)]
            top = xp.max(xp.concat(logs, axis=-1), axis=-1, keepdims=True)
            top = select(top == -INF, 0.0, top, xp)
        kappa = xp.exp(xp.where(used, kappa, top) - top)
    kappa = select(used, kappa, 0.0, xp)
    if normaliser == "sum":
        h = xp.sum(kappa, axis=-1, keepdims=True)
    else:
        h = seen if normaliser == "count" else select(seen == 0, 0.0, xp.ones_like(seen), xp)
    zero = h == 0
    h = select(zero, 1.0, h, xp)
    lse = select(zero, -INF, top + xp.log(h), xp)
    return select(used & ~zero, kappa / h, 0.0, xp), lse[..., 0]


def _contract(weights: Any, visible: Any, values: Any, xp: Any) -> Any:
    """Compute weights @ values where a row takes nothing from values that it does not see.

    A product with 0 would carry NaN and inf into every row. They are left out of the product,
    and what they add to the rows that see them is counted: +inf, -inf, or NaN when they
    disagree, are NaN, or have weight 0.
    """
    finite = xp.isfinite(values)
    out = xp.matmul(weights, select(finite, values, 0.0, xp))
    # Counts are exact in float32, whatever the dtype.
    seen = xp.matmul(xp.astype(visible, xp.float32), xp.astype(~finite, xp.float32))
    net = xp.matmul(_sign(weights, xp), _sign(select(finite, 0.0, values, xp), xp))
    added = select(net == -seen, -INF, xp.full_like(out, math.nan), xp)
    added = select(net == seen, INF, added, xp)
    return out + select(seen == 0, 0.0, added, xp)


def _sign(x: Any, xp: Any) -> Any:
    return xp.astype(x > 0, xp.float32) - xp.astype(x < 0, xp.float32)
