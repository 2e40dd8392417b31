"""Statistics of a head's keys as mergeable states.

A state is computed from a block of keys and merged with the states of other blocks. Blocking,
prefix scans, sequence shards and decoding all need only the four operations of `Statistics`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ..arrays import overflow_as_nan
from ..errors import UnsupportedError

__all__ = ["KeySet", "Mean", "Moments", "Statistics"]

State = Mapping[str, Any]


class Statistics(ABC):
    """A mergeable summary of keys: ``zero, of, merge, finalize``.

    A state is a mapping of names to arrays whose last two axes are rows and features, so that
    it broadcasts against keys (*B, H, M, D). An iterative statistic (the EM steps of a mixture)
    sets `rounds` and receives the finalised state of the previous round as `previous`.
    """

    rounds: int = 1

    # Plans compare by their statistics, and two plans of one spec must be equal.
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @abstractmethod
    def zero(self, like: State, *, xp: Any) -> State:
        """Return the neutral element of `merge`, with the shapes of `like`."""

    @abstractmethod
    def of(self, keys: Any, mask: Any, *, xp: Any, previous: State | None = None) -> State:
        """Compute the state of one block of keys.

        Parameters
        ----------
        keys : array (*B, H, M, D)
            Keys in the accumulation dtype; where `mask` is False they are finite.
        mask : bool array broadcastable to (*B, H, M, 1), or None
            True for a real key.
        xp : namespace
            The array-API namespace.
        previous : mapping, optional
            The finalised state of the previous round.
        """

    @abstractmethod
    def merge(self, a: State, b: State, *, xp: Any) -> State:
        """Merge the states of two disjoint blocks, `a` before `b`."""

    @abstractmethod
    def finalize(self, state: State, *, xp: Any) -> State:
        """Compute from a merged state the statistics that `Normalization.apply` reads."""

    def vjp(self, keys: Any, mask: Any, final: State, cotangent: State, *, xp: Any) -> Any:
        """Pull a cotangent of the finalised state back to the keys."""
        raise UnsupportedError(
            f"{type(self).__name__}: vjp is not written, so backends without automatic "
            "differentiation (numpy, cupy) cannot give its gradient"
        )


class Mean(Statistics):
    """Count and mean per feature."""

    def zero(self, like: State, *, xp: Any) -> State:
        """Return the state of zero keys."""
        return {name: xp.zeros_like(value) for name, value in like.items()}

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: State | None = None) -> State:
        """Compute the state of one block, see `Statistics.of`."""
        real = xp.ones_like(keys[..., :1]) if mask is None else xp.astype(mask, keys.dtype)
        n = xp.sum(real, axis=-2, keepdims=True)
        n = xp.broadcast_to(n, (*keys.shape[:-2], 1, 1))
        divisor = xp.where(n > 0, n, xp.ones_like(n))
        return {"n": n, "mean": _sum(keys, mask, xp) / divisor}

    def merge(self, a: State, b: State, *, xp: Any) -> State:
        """Merge the means, weighted by the counts."""
        n = a["n"] + b["n"]
        weight = b["n"] / xp.where(n > 0, n, xp.ones_like(n))
        return {"n": n, "mean": a["mean"] + (b["mean"] - a["mean"]) * weight}

    def finalize(self, state: State, *, xp: Any) -> State:
        """Return ``mean`` and the count ``n``; both are 0 for zero keys.

        A mean beyond the range of its dtype is NaN: a score of -inf would hide its key.
        """
        return {"n": state["n"], "mean": overflow_as_nan(state["mean"], xp)}

    def vjp(self, keys: Any, mask: Any, final: State, cotangent: State, *, xp: Any) -> Any:
        """Pull ``mean`` and ``var`` back: (d_mean + 2 d_var (k - mean)) / n at real keys."""
        n = final["n"]
        grad = cotangent.get("mean", 0.0)
        if "var" in cotangent:
            grad = grad + 2.0 * cotangent["var"] * (keys - final["mean"])
        grad = grad + xp.zeros_like(keys)
        grad = grad / xp.where(n > 0, n, xp.ones_like(n))
        return grad if mask is None else xp.where(mask, grad, xp.zeros_like(grad))

    def prefix_vjp(
        self, keys: Any, mask: Any, rows: State, cotangent: State, later: Any, *, xp: Any
    ) -> Any:
        """Pull the ``mean`` and ``var`` of many prefixes back to the keys.

        Parameters
        ----------
        keys : array (*B, H, M, D)
            Keys.
        mask : bool array broadcastable to (*B, H, M, 1), or None
            True for a real key.
        rows : mapping
            The finalised states of the rows' prefixes, (*B, H, N, D).
        cotangent : mapping
            The cotangents of ``mean`` and ``var``, (*B, H, N, D); ``var`` may be left out.
        later : integer array (M, 1) or (*B, 1, 1, M, 1)
            The number of rows whose prefix contains the key; these are the last rows.
        xp : namespace
            The array-API namespace.

        Returns
        -------
        array like `keys`
            sum_i (d_mean_i + 2 d_var_i (k_j - mean_i)) / n_i over the rows whose prefix contains
            key j, computed as sums over the last rows. To keep digits, means are taken relative
            to the first row's mean, which is near every later mean in units of its deviation.
        """
        n = rows["n"]
        share = xp.where(n > 0, 1.0 / xp.where(n > 0, n, xp.ones_like(n)), xp.zeros_like(n))
        level = cotangent["mean"] * share

        def at_keys(x: Any) -> Any:
            sums = xp.cumulative_sum(xp.flip(x, axis=-2), axis=-2, include_initial=True)
            if later.ndim == 2:
                return xp.take(sums, later[:, 0], axis=-2)
            index = xp.broadcast_to(later[..., 0, :, :], (*sums.shape[:-2], *keys.shape[-2:]))
            return xp.take_along_axis(sums, index, axis=-2)

        if "var" in cotangent:
            origin = _first_mean(rows, xp)
            slope = 2.0 * cotangent["var"] * share
            level = level - slope * (rows["mean"] - origin)
            grad = at_keys(level) + at_keys(slope) * (keys - origin)
        else:
            grad = at_keys(level)
        return grad if mask is None else xp.where(mask, grad, xp.zeros_like(grad))


class Moments(Mean):
    """Count, mean and centred second moment (M2) per feature.

    Computed by two passes within a block and Chan's update between blocks (Chan, Golub and
    LeVeque, 1979), which lose no digits where the mean is much larger than the deviation.
    """

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: State | None = None) -> State:
        """Compute the state of one block, see `Statistics.of`."""
        state = super().of(keys, mask, xp=xp)
        deviation = keys - state["mean"]
        return {**state, "m2": _sum(deviation * deviation, mask, xp)}

    def merge(self, a: State, b: State, *, xp: Any) -> State:
        """Merge by Chan's update."""
        n = a["n"] + b["n"]
        weight = b["n"] / xp.where(n > 0, n, xp.ones_like(n))
        delta = b["mean"] - a["mean"]
        return {
            "n": n,
            "mean": a["mean"] + delta * weight,
            "m2": a["m2"] + b["m2"] + delta * delta * (a["n"] * weight),
        }

    def finalize(self, state: State, *, xp: Any) -> State:
        """Return ``mean``, the biased ``var`` and the count ``n``; all are 0 for zero keys.

        A variance beyond the range of its dtype is NaN: division by inf would hide every key.
        """
        n = state["n"]
        var = state["m2"] / xp.where(n > 0, n, xp.ones_like(n))
        return {"n": n, "mean": state["mean"], "var": overflow_as_nan(var, xp)}


class KeySet(Statistics):
    """The keys themselves, for a normalization that needs every key, such as a convolution.

    The state has ``keys`` and ``mask``. States are merged by concatenation; memory is O(M).
    """

    def zero(self, like: State, *, xp: Any) -> State:
        """Return an empty set."""
        return {name: value[..., :0, :] for name, value in like.items()}

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: State | None = None) -> State:
        """Return a block of keys with its mask."""
        if mask is None:
            mask = xp.ones_like(keys[..., :1], dtype=xp.bool)
        return {"keys": keys, "mask": xp.broadcast_to(mask, (*keys.shape[:-1], 1))}

    def merge(self, a: State, b: State, *, xp: Any) -> State:
        """Concatenate two blocks."""
        return {name: xp.concat([a[name], b[name]], axis=-2) for name in ("keys", "mask")}

    def finalize(self, state: State, *, xp: Any) -> State:
        """Return the state unchanged."""
        return state

    def vjp(self, keys: Any, mask: Any, final: State, cotangent: State, *, xp: Any) -> Any:
        """Return the cotangent of ``keys``."""
        return cotangent["keys"]


def reduce_axis(stats: Statistics, state: State, axis: int, *, xp: Any) -> State:
    """Merge a state over one of its axes, in a balanced tree; the axis stays, of length 1."""
    size = next(iter(state.values())).shape[axis]
    while size > 1:
        half = size // 2
        first = _cut(state, axis, 0, half)
        merged = stats.merge(first, _cut(state, axis, half, 2 * half), xp=xp)
        if size % 2:
            last = _cut(state, axis, 2 * half, size)
            merged = {name: xp.concat([merged[name], last[name]], axis=axis) for name in merged}
        state, size = merged, half + size % 2
    return state


def prefix_states(stats: Statistics, keys: Any, mask: Any, *, xp: Any) -> State:
    """Compute the state of every prefix of the keys, including the empty prefix.

    Parameters
    ----------
    stats : Statistics
        A statistic of one round whose states have a fixed size.
    keys : array (*B, H, M, D)
        Keys.
    mask : bool array broadcastable to (*B, H, M, 1), or None
        True for a real key.
    xp : namespace
        The array-API namespace.

    Returns
    -------
    mapping
        Arrays (*B, H, M + 1, ...): entry c is the state of the first c keys. It is merged from
        the states of these keys alone, in a scan of log2 M steps without subtractions, so a
        later key has no influence on an earlier row.
    """
    single = stats.of(
        xp.expand_dims(keys, axis=-2),
        None if mask is None else xp.expand_dims(mask, axis=-2),
        xp=xp,
    )
    state = {name: value[..., 0, :] for name, value in single.items()}
    length, step = keys.shape[-2], 1
    while step < length:
        before = _cut(state, -2, 0, length - step)
        merged = stats.merge(before, _cut(state, -2, step, length), xp=xp)
        head = _cut(state, -2, 0, step)
        state = {name: xp.concat([head[name], merged[name]], axis=-2) for name in merged}
        step *= 2
    # Without keys, a sum over them is a state of zeros of the right shape, dtype and device.
    first = {
        name: value[..., :1, :] if length else xp.sum(value, axis=-2, keepdims=True)
        for name, value in state.items()
    }
    empty = stats.zero(first, xp=xp)
    return {name: xp.concat([empty[name], value], axis=-2) for name, value in state.items()}


def _first_mean(rows: State, xp: Any) -> Any:
    """Return the mean of the first row that has keys, (*B, H, 1, D)."""
    nonempty = rows["n"] > 0
    first = nonempty & (xp.cumulative_sum(xp.astype(nonempty, xp.int64), axis=-2) == 1)
    mean = rows["mean"]
    return xp.sum(xp.where(first, mean, xp.zeros_like(mean)), axis=-2, keepdims=True)


def _cut(state: State, axis: int, start: int, stop: int) -> dict[str, Any]:
    index: list[Any] = [slice(None)] * next(iter(state.values())).ndim
    index[axis] = slice(start, stop)
    return {name: value[tuple(index)] for name, value in state.items()}


def _sum(x: Any, mask: Any, xp: Any) -> Any:
    if mask is not None:
        x = xp.where(mask, x, xp.zeros_like(x))
    return xp.sum(x, axis=-2, keepdims=True)
