"""Head scaling (Attention-SH): the pooled keys that a head is fitted on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..arrays import device_of
from ..errors import SpecError, nearest

__all__ = ["HeadScaling"]

_POOLS = ("mean", "first")
#: Equal scales in a row are written as ``2*16`` from this number on.
_RUN = 5


@dataclass(frozen=True)
class HeadScaling:
    """The scale of each key head, and how a window of keys is pooled into one key.

    Parameters
    ----------
    scales : tuple of int
        One scale per key head; empty for plain attention whatever the number of heads.
    pool : {"mean", "first"}
        The mean over the window's real keys, or its first real key.
    half : int, optional
        In place of `scales`, for any number of heads: the scale of the last floor(Hkv / 2) key
        heads, where the others have scale 1.
    """

    scales: tuple[int, ...] = ()
    pool: str = "mean"
    half: int | None = None

    def __post_init__(self) -> None:
        for scale in (*self.scales, 1 if self.half is None else self.half):
            if type(scale) is not int or scale < 1:
                raise SpecError(f"sh: scale {scale!r}, expected whole numbers >= 1")
        if self.scales and self.half is not None:
            raise SpecError(
                f"sh: got scales ({scales_text(self.scales)}) and half={self.half}, expected one "
                "of them: half gives every head its scale"
            )
        if self.pool not in _POOLS:
            raise SpecError(f"sh: pool is {self.pool!r}; {nearest(str(self.pool), _POOLS)}")
        if self.pool != "mean" and not self.scales and self.half is None:
            raise SpecError(
                f"sh: pool={self.pool} without scales pools nothing; expected one "
                "scale per key head"
            )

    @property
    def largest(self) -> int:
        """The largest scale, of `half` the largest for any number of heads."""
        return max((*self.scales, self.half or 1))

    def __str__(self) -> str:
        arguments = [scales_text(self.scales)] if self.scales else []
        arguments += [f"half={self.half}"] if self.half is not None else []
        arguments += [f"pool={self.pool}"] if self.pool != "mean" else []
        return f"sh({','.join(arguments)})"

    def for_heads(self, heads: int) -> HeadScaling:
        """Return the head scaling with one scale for each of `heads` key heads for `half`."""
        if self.half is None:
            return self
        last = heads // 2
        return HeadScaling((1,) * (heads - last) + (self.half,) * last, self.pool)

    def groups(self, heads: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Group the heads by scale: heads of equal scale are computed together.

        Returns
        -------
        tuple of (scale, head indices)
            In the order of the first head of each scale.
        """
        scales = self.scales or (1,) * heads
        heads_by_scale: dict[int, list[int]] = {}
        for head, scale in enumerate(scales):
            heads_by_scale.setdefault(scale, []).append(head)
        return tuple((scale, tuple(indices)) for scale, indices in heads_by_scale.items())


def scales_text(scales: tuple[int, ...]) -> str:
    """Return scales as text, long runs of equal ones as ``2*16``."""
    counted = ((scale, len(list(run))) for scale, run in groupby(scales))
    return ",".join(f"{s}*{n}" if n >= _RUN else ",".join([str(s)] * n) for s, n in counted)


def pooling_weights(length: int, real: Any, scale: int, pool: str, like: Any, *, xp: Any) -> Any:
    """Compute each key's weight in its window.

    Parameters
    ----------
    length : int
        The number of keys M.
    real : bool array (*B, 1, M) or None
        True for a real key.
    scale : int
        The window's length s.
    pool : {"mean", "first"}
        As in `HeadScaling`.
    like : array
        An array with the dtype and device of the weights.
    xp : namespace
        The array-API namespace.

    Returns
    -------
    array (*B, 1, ceil(M / s), s), or (1, ceil(M / s), s) without `real`
        Weights that sum to 1 over a window, or are all 0 where it has no real key.
    """
    if real is None:
        real = xp.ones((1, length), dtype=xp.bool, device=device_of(like))
    member = xp.astype(windows(real[..., None], scale, xp=xp)[..., 0], like.dtype)
    if pool == "first":
        return xp.where(xp.cumulative_sum(member, axis=-1) == 1, member, xp.zeros_like(member))
    count = xp.sum(member, axis=-1, keepdims=True)
    return member / xp.where(count > 0, count, xp.ones_like(count))


def windows(x: Any, scale: int, *, xp: Any) -> Any:
    """Cut rows (..., M, D) into windows (..., ceil(M / s), s, D), padded with zeros."""
    *lead, length, dim = x.shape
    count = -(-length // scale)
    missing = count * scale - length
    if missing:
        padding = xp.zeros((*lead, missing, dim), dtype=x.dtype, device=device_of(x))
        x = xp.concat([x, padding], axis=-2)
    return xp.reshape(x, (*lead, count, scale, dim))


def pool(kind: str, x: Any, weights: Any, *, xp: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Pool rows by the weights of `pooling_weights`.

    Parameters
    ----------
    kind : {"mean", "first"}
        As in `HeadScaling`.
    x : array (*B, H, M, D)
        Keys or values, zeros where a key is not real.
    weights : array (*B, 1, ceil(M / s), s)
        Each key's weight in its window.
    xp : namespace
        The array-API namespace.

    Returns
    -------
    pooled : array (*B, H, ceil(M / s), D)
    pullback : callable
        Maps a cotangent of `pooled` to one of `x`.
    """
    weights = weights[..., None]
    cut = windows(x, weights.shape[-2], xp=xp)
    if kind == "mean":
        # The real keys of a window have equal weights, and its other keys are zeros.
        pooled = xp.sum(cut, axis=-2) * xp.max(weights, axis=-2)
    else:
        # `where` keeps a NaN in a key of weight 0 out of the sum.
        pooled = xp.sum(xp.where(weights > 0, cut * weights, xp.zeros_like(cut)), axis=-2)

    def pullback(cotangent: Any) -> Any:
        grad = cotangent[..., None, :] * weights
        *lead, count, scale, dim = grad.shape
        return xp.reshape(grad, (*lead, count * scale, dim))[..., : x.shape[-2], :]

    return pooled, pullback
