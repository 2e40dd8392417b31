"""The normalizations by their formulas, a part of the oracle.

As in `pdcore.reference.attention`, formulas are for one head and any array library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..arrays import constant
from ..errors import UnsupportedError
from ..spec import (
    AttentionSpec,
    Batch,
    Conv1d,
    Conv2d,
    Identity,
    InstanceEnhanced,
    Mixture,
    Normalization,
    uniform_draws,
)
from .inputs import ReferenceCall, hook_params, prepare, select

__all__ = ["moments", "prefix_inner_products", "reference_keys", "transform_of"]


def reference_keys(k: Any, spec: AttentionSpec, params: Mapping[str, Any]) -> Any:
    """Compute T of the keys of one head, (*B, 1, M, D), without padding and pooling."""
    call = prepare(k, k, k, spec, None, None, None, 0, params, None)
    return transform_of(call, call.k[..., 0, :, :], call.real, call.params)[1][..., None, :, :]


def transform_of(
    call: ReferenceCall, keys: Any, real: Any, params: Mapping[str, Any]
) -> tuple[Callable[[Any], Any], Any]:
    """Return T as a function of queries, and T of the keys, for one head.

    Parameters
    ----------
    call : ReferenceCall
    keys : array (*B, W, D)
        The pooled keys of the head.
    real : bool array (*B, W)
        True for a real pooled key.
    params : mapping of str to array
        The parameters of the head.

    Returns
    -------
    transform : callable
        T of queries (*B, N, D).
    array (*B, W, D)
        T of the keys.
    """
    xp, normalization = call.xp, call.spec.normalization
    if type(normalization) is Conv1d or type(normalization) is Conv2d:
        return lambda x: x, _convolved(normalization, keys, real, params["weight"][0, ...], call)
    if type(normalization).apply_keys is not Normalization.apply_keys:
        shaped = hook_params(normalization, call, params)
        state = _statistics(normalization, keys, real, xp)
        y = normalization.apply_keys(keys[..., None, :, :], state, xp=xp, params=shaped)
        return _apply_hook(normalization, state, shaped, xp), y[..., 0, :, :]
    transform = _rowwise_transform(call, keys, real, params)
    return transform, transform(keys)


def _rowwise_transform(
    call: ReferenceCall, keys: Any, real: Any, params: Mapping[str, Any]
) -> Callable[[Any], Any]:
    """Return T where it is the same function for queries and keys, row by row."""
    xp, normalization = call.xp, call.spec.normalization
    if type(normalization) is Identity:
        return lambda x: x
    if type(normalization) is Batch:
        if call.spec.shift_cancels:  # and with it a NaN in a mean that no result depends on
            return lambda x: x
        var: Any
        if normalization.statistics == "running":
            mean, var = params["mean"], params.get("var")
        else:
            axes = tuple(range(keys.ndim - 1)) if normalization.statistics == "batch" else -2
            mean, var = moments(keys, real[..., None], axes, xp)
        beta = _beta(normalization, call, params)
        if not normalization.with_std:
            return lambda x: x - beta * mean
        return lambda x: (x - beta * mean) / xp.sqrt(var + normalization.eps)

    if type(normalization) is InstanceEnhanced:
        beta = _beta(normalization, call, params)
        return _instance_enhanced(normalization, beta, keys, real, params, xp)
    if type(normalization) is Mixture:
        return _mixture(normalization, keys, real, xp)

    shaped = hook_params(normalization, call, params)
    return _apply_hook(normalization, _statistics(normalization, keys, real, xp), shaped, xp)


# --- a user's normalization, by its public methods, whose arrays have a head axis ---------------


def _statistics(t: Normalization, keys: Any, real: Any, xp: Any) -> Mapping[str, Any]:
    """Compute the finalised statistics of a head's keys."""
    state: Mapping[str, Any] = {}
    statistics = t.statistics_state()
    if statistics is not None:
        previous = None
        block, mask = keys[..., None, :, :], real[..., None, :, None]
        for _ in range(statistics.rounds):
            state = statistics.of(block, mask, xp=xp, previous=previous)
            state = previous = statistics.finalize(state, xp=xp)
    return state


def _apply_hook(
    t: Normalization, state: Mapping[str, Any], params: Mapping[str, Any], xp: Any
) -> Callable[[Any], Any]:
    return lambda x: t.apply(x[..., None, :, :], state, xp=xp, params=params)[..., 0, :, :]


# --- the normalizations of pdcore -----------------------------------------------------------------


def _beta(
    normalization: Batch | InstanceEnhanced, call: ReferenceCall, params: Mapping[str, Any]
) -> Any:
    """Return the weight of the mean, (D,)."""
    dim = call.q.shape[-1]
    if normalization.beta != "param":
        return call.xp.full((dim,), normalization.beta, dtype=call.dtype, device=call.device)
    return call.xp.broadcast_to(params["beta"][0, ...], (dim,))


def prefix_inner_products(
    call: ReferenceCall, q: Any, keys: Any, counted: Any, params: Mapping[str, Any]
) -> Any:
    """Compute T_p(x).T_p(y) for a query at position p and every key y, (*B, N, W).

    T_p has the moments of the keys for which `counted`, bool (*B, N, W), is True in the row.
    """
    xp, normalization = call.xp, call.spec.normalization
    if type(normalization) is not Batch:
        raise UnsupportedError(f"{normalization.word}: no formula for its prefix statistics")
    beta = _beta(normalization, call, params)
    inner = xp.zeros(counted.shape, dtype=call.dtype, device=call.device)
    for d in range(q.shape[-1]):
        x, y = q[..., d][..., :, None], keys[..., d][..., None, :]
        mean, var = moments(xp.broadcast_to(y, counted.shape), counted, -1, xp)
        x, y = x - beta[d] * mean, y - beta[d] * mean
        if normalization.with_std:
            std = xp.sqrt(var + normalization.eps)
            x, y = x / std, y / std
        inner = inner + call.rounded(x) * call.rounded(y)
    return inner


def moments(x: Any, included: Any, axes: Any, xp: Any) -> tuple[Any, Any]:
    """Compute mean and biased variance over the included entries; 0 without any."""
    included = xp.broadcast_to(included, x.shape)
    count = xp.sum(xp.astype(included, x.dtype), axis=axes, keepdims=True)
    count = select(count > 0, count, 1.0, xp)
    mean = xp.sum(select(included, x, 0.0, xp), axis=axes, keepdims=True) / count
    deviation = select(included, x - mean, 0.0, xp)
    return mean, xp.sum(deviation * deviation, axis=axes, keepdims=True) / count


def _instance_enhanced(
    t: InstanceEnhanced, beta: Any, keys: Any, real: Any, params: Mapping[str, Any], xp: Any
) -> Callable[[Any], Any]:
    """Return T for one head, from its pooled keys (*B, W, D); real (*B, W)."""
    mean, var = moments(keys, real[..., None], -2, xp)
    z = params["slope"] * mean + params["shift"]
    small = xp.exp(-xp.abs(z))  # the sigmoid in the one of its two forms that does not overflow
    gate = select(z < 0, small / (1.0 + small), 1.0 / (1.0 + small), xp)
    return lambda x: gate * ((x - beta * mean) / xp.sqrt(var + t.eps))


def _convolved(t: Conv1d | Conv2d, keys: Any, real: Any, weight: Any, call: ReferenceCall) -> Any:
    """Convolve the keys (*B, W, D); weight (size, D) or (size, size, D)."""
    xp = call.xp
    x = select(real[..., None], keys, 0.0, xp)
    index = xp.arange(x.shape[-2], device=call.device)
    total = xp.zeros_like(x)
    if isinstance(t, Conv1d):
        back = t.size - 1 if t.padding == "causal" else (t.size - 1) // 2
        for tap in range(t.size):
            neighbour = index + (tap - back)
            inside = (neighbour >= 0) & (neighbour < x.shape[-2])
            total = total + weight[tap, ...] * _take_or_zero(x, neighbour, inside, xp)
        return total
    back, row, column = (t.size - 1) // 2, index // t.width, index % t.width
    for down in range(t.size):
        for across in range(t.size):
            r, c = row + (down - back), column + (across - back)
            inside = (r >= 0) & (r < t.height) & (c >= 0) & (c < t.width)
            neighbours = _take_or_zero(x, r * t.width + c, inside, xp)
            total = total + weight[down, across, ...] * neighbours
    return total


def _take_or_zero(x: Any, index: Any, inside: Any, xp: Any) -> Any:
    """Take the rows of x at `index`, and zeros where `inside` is False."""
    rows = xp.take(x, xp.where(inside, index, xp.zeros_like(index)), axis=-2)
    return select(xp.broadcast_to(inside[:, None], rows.shape), rows, 0.0, xp)


def _mixture(t: Mixture, keys: Any, real: Any, xp: Any) -> Callable[[Any], Any]:
    """Return T for one head, from its pooled keys (*B, W, D); real (*B, W)."""
    included = real[..., None]
    _, var = moments(keys, included, -2, xp)
    mean = _centres(t, keys, included, xp)  # (*B, K, D)
    var = var + xp.zeros_like(mean)
    share = xp.full_like(mean[..., 0], 1.0 / t.components)  # (*B, K)
    for _ in range(t.steps):
        # Only the last step is differentiated: the mixture that it starts from is a constant.
        start = [constant(x, xp) for x in (mean, var, share)]
        r = select(included, _posterior(keys, start[0], start[1], start[2], t.eps, xp), 0.0, xp)
        weight = xp.sum(r, axis=-2)
        divisor = select(weight > 0, weight, 1.0, xp)[..., None]
        mean = xp.sum(r[..., None] * keys[..., :, None, :], axis=-3) / divisor
        deviation = keys[..., :, None, :] - mean[..., None, :, :]
        var = xp.sum(r[..., None] * deviation * deviation, axis=-3) / divisor
        total = xp.sum(weight, axis=-1, keepdims=True)
        share = weight / select(total > 0, total, 1.0, xp)

    def transform(x: Any) -> Any:
        r = _posterior(x, mean, var, share, t.eps, xp)[..., None]
        std = xp.sqrt(var + t.eps)[..., None, :, :]
        return xp.sum(r * (x[..., :, None, :] - t.beta * mean[..., None, :, :]) / std, axis=-2)

    return transform


def _centres(t: Mixture, keys: Any, included: Any, xp: Any) -> Any:
    """Draw the centres of k-means++, (*B, K, D), by inverting distribution functions."""
    real = xp.astype(included[..., 0], keys.dtype)  # (*B, W): equal chances for the first centre
    chance, nearest, centres = real, xp.full_like(real, math.inf), []
    for u in uniform_draws(t.components, t.seed):
        total = xp.cumulative_sum(chance, axis=-1)
        above = total > u * total[..., -1:]
        drawn = above & (xp.cumulative_sum(xp.astype(above, xp.int64), axis=-1) == 1)
        centres.append(xp.sum(select(drawn[..., None], keys, 0.0, xp), axis=-2))
        deviation = keys - centres[-1][..., None, :]
        square = real * xp.sum(deviation * deviation, axis=-1)
        nearest = xp.minimum(nearest, square)
        distinct = xp.any(nearest > 0, axis=-1, keepdims=True)
        chance = xp.where(distinct, nearest, real)
    return xp.stack(centres, axis=-2)


def _posterior(x: Any, mean: Any, var: Any, share: Any, eps: float, xp: Any) -> Any:
    """Compute pi_k N(x; mean_k, var_k + eps), normalised over k, (*B, R, K), for (*B, R, D)."""
    deviation = x[..., :, None, :] - mean[..., None, :, :]
    spread = (var + eps)[..., None, :, :]
    positive = share[..., None, :] > 0
    log_density = -0.5 * xp.sum(deviation * deviation / spread + xp.log(spread), axis=-1)
    log_joint = log_density + xp.log(select(positive, share[..., None, :], 1.0, xp))
    log_joint = select(positive, log_joint, -math.inf, xp)
    top = constant(xp.max(log_joint, axis=-1, keepdims=True), xp)
    joint = xp.exp(log_joint - select(top > -math.inf, top, 0.0, xp))
    total = xp.sum(joint, axis=-1, keepdims=True)
    return joint / select(total > 0, total, 1.0, xp)
