"""The normalizations by their formulas: part of the oracle.

As in `pdcore.reference`: one head at a time, direct formulas, any array library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .arrays import constant
from .errors import UnsupportedError
from .instance_enhanced import InstanceEnhanced
from .mixture import Mixture, draws
from .normalization import Batch, Identity
from .reference_inputs import Call, hook_params, select

__all__ = ["prefix_inner_products", "transform_of"]


def transform_of(
    call: Call, keys: Any, real: Any, params: Mapping[str, Any]
) -> Callable[[Any], Any]:
    """Give T for one head, from its pooled keys (*B, W, D); real (*B, W)."""
    xp, normalization = call.xp, call.spec.normalization
    if type(normalization) is Identity:
        return lambda x: x
    if type(normalization) is Batch:
        if normalization.statistics == "running":
            mean, var = params["mean"], params["var"]
        else:
            axes = tuple(range(keys.ndim - 1)) if normalization.statistics == "batch" else -2
            mean, var = _moments(keys, real[..., None], axes, xp)
        beta = _beta(normalization, call, params)
        return lambda x: (x - beta * mean) / xp.sqrt(var + normalization.eps)

    if type(normalization) is InstanceEnhanced:
        return _instance_enhanced(normalization, keys, real, params, xp)
    if type(normalization) is Mixture:
        return _mixture(normalization, keys, real, xp)

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


def prefix_inner_products(
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
        mean, var = _moments(xp.broadcast_to(y, counted.shape), counted, -1, xp)
        centre, deviation = beta[d] * mean, xp.sqrt(var + normalization.eps)
        x, y = (x - centre) / deviation, (y - centre) / deviation
        inner = inner + call.rounded(x) * call.rounded(y)
    return inner


def _moments(x: Any, included: Any, axes: Any, xp: Any) -> tuple[Any, Any]:
    """Take the mean and the biased variance over the included entries; 0 where there are none."""
    included = xp.broadcast_to(included, x.shape)
    count = xp.sum(xp.astype(included, x.dtype), axis=axes, keepdims=True)
    count = select(count > 0, count, 1.0, xp)
    mean = xp.sum(select(included, x, 0.0, xp), axis=axes, keepdims=True) / count
    deviation = select(included, x - mean, 0.0, xp)
    return mean, xp.sum(deviation * deviation, axis=axes, keepdims=True) / count


def _instance_enhanced(
    t: InstanceEnhanced, keys: Any, real: Any, params: Mapping[str, Any], xp: Any
) -> Callable[[Any], Any]:
    """Give T for one head, from its pooled keys (*B, W, D); real (*B, W)."""
    mean, var = _moments(keys, real[..., None], -2, xp)
    z = params["slope"] * mean + params["shift"]
    small = xp.exp(-xp.abs(z))  # of the two forms of the sigmoid the one that does not overflow
    gate = select(z < 0, small / (1.0 + small), 1.0 / (1.0 + small), xp)
    return lambda x: gate * ((x - t.beta * mean) / xp.sqrt(var + t.eps))


def _mixture(t: Mixture, keys: Any, real: Any, xp: Any) -> Callable[[Any], Any]:
    """Give T for one head, from its pooled keys (*B, W, D); real (*B, W)."""
    included = real[..., None]
    _, var = _moments(keys, included, -2, xp)
    mean = _centres(t, keys, included, xp)  # (*B, K, D)
    var = var + xp.zeros_like(mean)
    share = xp.full_like(mean[..., 0], 1.0 / t.components)  # (*B, K)
    for _ in range(t.steps):
        # Only the last step is differentiated: it starts from a mixture that is held constant.
        start = [constant(x, xp) for x in (mean, var, share)]
        r = select(included, _posterior(keys, start[0], start[1], start[2], t.eps, xp), 0.0, xp)
        weight = xp.sum(r, axis=-2)
        divisor = select(weight > 0, weight, 1.0, xp)[..., None]
        mean = xp.sum(r[..., None] * keys[..., :, None, :], axis=-3) / divisor
        apart = keys[..., :, None, :] - mean[..., None, :, :]
        var = xp.sum(r[..., None] * apart * apart, axis=-3) / divisor
        total = xp.sum(weight, axis=-1, keepdims=True)
        share = weight / select(total > 0, total, 1.0, xp)

    def transform(x: Any) -> Any:
        r = _posterior(x, mean, var, share, t.eps, xp)[..., None]
        deviation = xp.sqrt(var + t.eps)[..., None, :, :]
        return xp.sum(
            r * (x[..., :, None, :] - t.beta * mean[..., None, :, :]) / deviation, axis=-2
        )

    return transform


def _centres(t: Mixture, keys: Any, included: Any, xp: Any) -> Any:
    """Draw the centres of k-means++, (*B, K, D), by inverting distribution functions."""
    chance = xp.astype(included[..., 0], keys.dtype)  # (*B, W): the first is any real key
    everyone, nearest, centres = chance, xp.full_like(chance, math.inf), []
    for u in draws(t.components, t.seed):
        total = xp.cumulative_sum(chance, axis=-1)
        above = total > u * total[..., -1:]
        chosen = above & (xp.cumulative_sum(xp.astype(above, xp.int64), axis=-1) == 1)
        centres.append(xp.sum(select(chosen[..., None], keys, 0.0, xp), axis=-2))
        apart = keys - centres[-1][..., None, :]
        square = everyone * xp.sum(apart * apart, axis=-1)
        nearest = xp.minimum(nearest, square)
        left = xp.any(nearest > 0, axis=-1, keepdims=True)
        chance = xp.where(left, nearest, everyone)
    return xp.stack(centres, axis=-2)


def _posterior(x: Any, mean: Any, var: Any, share: Any, eps: float, xp: Any) -> Any:
    """Compute pi_k N(x; mean_k, var_k + eps), normalised over k, (*B, R, K) of (*B, R, D)."""
    apart = x[..., :, None, :] - mean[..., None, :, :]
    spread = (var + eps)[..., None, :, :]
    alive = share[..., None, :] > 0
    log_density = -0.5 * xp.sum(apart * apart / spread + xp.log(spread), axis=-1)
    log_joint = log_density + xp.log(select(alive, share[..., None, :], 1.0, xp))
    log_joint = select(alive, log_joint, -math.inf, xp)
    top = constant(xp.max(log_joint, axis=-1, keepdims=True), xp)
    joint = xp.exp(log_joint - select(top > -math.inf, top, 0.0, xp))
    total = xp.sum(joint, axis=-1, keepdims=True)
    return joint / select(total > 0, total, 1.0, xp)
