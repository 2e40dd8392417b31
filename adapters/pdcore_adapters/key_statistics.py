"""The statistics by which layers update what they keep between calls.

A state is that of `pdcore.Statistics`, over the real keys of all sequences of a call after head
scaling, for all key heads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdcore import AttentionSpec, UnsupportedError
from pdcore.extend import Statistics, pool, pooling_weights, reduce_axis

__all__ = ["BATCHES", "merged", "real_keys", "state_of_keys", "statistics_of", "updated"]

#: The name of the number of updates.
BATCHES = "num_batches_tracked"

State = dict[str, Any]


def _statistics(spec: AttentionSpec) -> Statistics:
    statistics = spec.normalization.training.statistics_state()
    assert statistics is not None
    return statistics


def real_keys(spec: AttentionSpec, key_mask: Any, segments: Any, *, xp: Any) -> Any:
    """Return the mask of the real keys of a call, those of packed sequences included.

    Parameters
    ----------
    spec : AttentionSpec
    key_mask : bool array (*B, M) or None
        True for a real key.
    segments : integer array (*B, M), a pair of those of queries and keys, or None
        The ids of packed sequences, negative for padding; also as arrays of NumPy.
    xp : namespace
        The array-API namespace of `key_mask`.

    Raises
    ------
    UnsupportedError
        For packed sequences whose keys are pooled.
    """
    if segments is None:
        return key_mask
    if spec.heads.largest > 1:
        raise UnsupportedError(
            f"segments: {spec} pools the keys of each segment, whose running statistics "
            "the layer does not keep; use scales of 1, or pad the sequences"
        )
    ids = segments[1] if isinstance(segments, tuple | list) else segments
    real = xp.asarray(ids) >= 0
    return real if key_mask is None else key_mask & real


def state_of_keys(spec: AttentionSpec, k: Any, key_mask: Any, *, xp: Any) -> State:
    """Compute the state of the real, pooled keys of all sequences.

    Parameters
    ----------
    spec : AttentionSpec
    k : array (*B, H, M, D)
        Keys, of any floating-point dtype.
    key_mask : bool array (*B, M) or None
        True for a real key.
    xp : namespace
        The array-API namespace of `k`.

    Returns
    -------
    mapping of str to array (H, 1, D) or (H, 1, 1)
    """
    if k.dtype not in (xp.float32, xp.float64):
        k = xp.astype(k, xp.float32)
    real = None
    if key_mask is not None:
        real = key_mask[..., None, :]
        k = xp.where(real[..., None], k, xp.zeros_like(k))  # padding may hold NaN
    statistics, heads = _statistics(spec), k.shape[-3]
    scaling = spec.for_heads(heads).heads
    states: list[Any] = []
    order: list[int] = []
    for scale, members in scaling.groups(heads):
        keys, mask = xp.stack([k[..., h, :, :] for h in members], axis=-3), real
        if scale > 1:
            weights = pooling_weights(k.shape[-2], real, scale, scaling.pool, keys, xp=xp)
            keys, _ = pool(scaling.pool, keys, weights, xp=xp)
            mask = None if real is None else xp.any(weights > 0, axis=-1)
        states.append(statistics.of(keys, None if mask is None else mask[..., None], xp=xp))
        order += members
    place = sorted(range(heads), key=order.__getitem__)
    state = {name: xp.concat([part[name] for part in states], axis=-3) for name in states[0]}
    state = {name: xp.stack([x[..., i, :, :] for i in place], axis=-3) for name, x in state.items()}
    for axis in range(k.ndim - 3):
        state = dict(reduce_axis(statistics, state, axis, xp=xp))
    return {name: xp.reshape(x, x.shape[-3:]) for name, x in state.items()}


def merged(spec: AttentionSpec, states: Sequence[State], *, xp: Any) -> State:
    """Merge states of disjoint keys, in this order."""
    statistics = _statistics(spec)
    whole = states[0]
    for state in states[1:]:
        whole = dict(statistics.merge(whole, state, xp=xp))
    return whole


def statistics_of(spec: AttentionSpec, state: State, *, xp: Any) -> State:
    """Return what the state says about each buffer (H, D), by the name of the parameter."""
    final = _statistics(spec).finalize(state, xp=xp)
    names = [p.name for p in spec.parameters() if p.running]
    return {name: final[name][:, 0, :] for name in names}


def updated(
    spec: AttentionSpec,
    buffers: State,
    k: Any,
    key_mask: Any,
    momentum: float | None,
    axis: str | None,
) -> State:
    """Return the buffers of a layer in JAX after an update.

    Parameters
    ----------
    spec : AttentionSpec
    buffers : mapping of str to array
        The buffers by name, and the number of updates.
    k : array (*B, M, H, D)
        Keys of the call, heads after length.
    key_mask : bool array (*B, M) or None
        True for a real key.
    momentum : float or None
        The weight of the new statistics; None for their mean over all updates.
    axis : str or None
        The mapped axis along which there are other keys of the batch.
    """
    import jax
    from jax import numpy as jnp

    k = jnp.swapaxes(jax.lax.stop_gradient(k), -3, -2)
    state = state_of_keys(spec, k, key_mask, xp=jnp)
    if axis is not None:
        state = {name: jax.lax.all_gather(x, axis) for name, x in state.items()}
        state = dict(reduce_axis(_statistics(spec), state, 0, xp=jnp))
        state = {name: x[0] for name, x in state.items()}
    batches = buffers[BATCHES] + 1
    share = 1.0 / batches if momentum is None else momentum
    new = statistics_of(spec, state, xp=jnp)
    result = {BATCHES: batches}
    for p in spec.parameters():
        if p.running:
            old = buffers[p.buffer]
            value = jnp.where(state["n"][:, 0] > 0, jnp.asarray(new[p.name], old.dtype), old)
            result[p.buffer] = jnp.asarray(old + share * (value - old), old.dtype)
    return result
