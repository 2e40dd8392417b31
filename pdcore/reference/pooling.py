"""The windows of head scaling, a part of the oracle."""

from __future__ import annotations

from typing import Any

from .inputs import ReferenceCall, select

__all__ = ["pool", "pooled_keys", "windows"]


def windows(x: Any, scale: int, call: ReferenceCall) -> Any:
    """Split rows (*B, M, D) into the windows of head scaling, (*B, W, s, D), padded by zeros."""
    xp = call.xp
    *lead, length, dim = x.shape
    count = -(-length // scale)
    padding = xp.zeros((*lead, count * scale - length, dim), dtype=x.dtype, device=call.device)
    return xp.reshape(xp.concat([x, padding], axis=-2), (*lead, count, scale, dim))


def pool(x: Any, pooled: Any, call: ReferenceCall) -> Any:
    """Compute the mean over the pooled keys of each window, (*B, W, D); 0 without any."""
    xp = call.xp
    pooled = pooled[..., None]
    count = xp.sum(xp.astype(pooled, call.dtype), axis=-2)
    total = xp.sum(select(pooled, windows(x, pooled.shape[-2], call), 0.0, xp), axis=-2)
    return total / select(count > 0, count, 1.0, xp)


def pooled_keys(call: ReferenceCall, g: int) -> tuple[Any, Any, Any]:
    """Return the keys of a head after pooling, and the keys that each of them stands for.

    Returns
    -------
    keys : array (*B, W, D)
    in_window : bool array (*B, W, s)
        The real keys of each window.
    pooled : bool array (*B, W, s)
        Those of them that the pooled key is the mean of.
    """
    scaling, key_heads = call.spec.heads, call.k.shape[-3]
    scale = scaling.scales[g] if scaling.scales else 1
    if scaling.half is not None and g >= key_heads - key_heads // 2:
        scale = scaling.half
    in_window = windows(call.real[..., None], scale, call)[..., 0]
    pooled = in_window
    if scaling.pool == "first":
        order = call.xp.cumulative_sum(call.xp.astype(in_window, call.dtype), axis=-1)
        pooled = in_window & (order == 1)
    return pool(call.k[..., g, :, :], pooled, call), in_window, pooled
