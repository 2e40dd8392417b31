"""The transforms of a plan: array calls from (state, params, rows) to rows.

Each transform returns its result and a pullback, so that a step and its gradient are in one place.
Frameworks with automatic differentiation ignore the pullback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..arrays import device_of, overflow_as_nan, stop_gradient
from ..spec import FeatureMap, Normalization
from .plan import Transform

#: The keys of `central`.
_SAMPLE = 27

__all__ = ["FeatureRows", "GaussianRows", "KeyShift", "Normalize", "Pullback", "Rows", "UnitRows"]


class Rows(NamedTuple):
    """Queries and keys between the transforms of a plan; also their cotangents.

    Attributes
    ----------
    q : array (*B, H, R, D)
        Query rows; R = G N, the N queries of each of the G heads that share a key head.
    k : array (*B, H, M, D)
        Keys.
    key_bias : array (*B, H, M) or None
        Added to log kappa of a key.
    row_constant : array (*B, H, R) or None
        Added to log kappa of a row; cancels in the output, so it is added to L only.
    key_mask : bool array (*B, 1, M) or None
        True for a real key.
    fold : object or None
        What a backend's own transform leaves for its contraction to apply to the queries.
    """

    q: Any
    k: Any
    key_bias: Any = None
    row_constant: Any = None
    key_mask: Any = None
    fold: Any = None


Gradients = Mapping[str, Any]
Pullback = Callable[[Rows], tuple[Rows, Gradients, Gradients]]


def sum_to(x: Any, shape: tuple[int, ...], *, xp: Any) -> Any:
    """Sum the cotangent of a broadcast array to the shape before broadcasting."""
    extra = x.ndim - len(shape)
    if extra:
        x = xp.sum(x, axis=tuple(range(extra)))
    axes = tuple(
        a
        for a, (have, want) in enumerate(zip(x.shape, shape, strict=True))
        if want == 1 and have != 1
    )
    return xp.sum(x, axis=axes, keepdims=True) if axes else x


def add_into(total: dict[str, Any], more: Gradients) -> dict[str, Any]:
    """Add cotangents by name into `total`, and return it."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value
    return total


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of arrays by name, for `sum_to`."""
    return {name: tuple(value.shape) for name, value in arrays.items()}


@dataclass(frozen=True)
class Normalize:
    """The transform that applies a normalization T to queries and keys.

    Attributes
    ----------
    normalization : Normalization
        T.
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    normalization: Normalization
    choice: Transform | None = None

    @property
    def word(self) -> str:
        """The word of the normalization."""
        return self.normalization.word

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback; see `Rows`."""
        t = self.normalization

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            grads = []
            dstate: dict[str, Any] = {}
            dparams: dict[str, Any] = {}
            for x, dx, pull in ((rows.q, d.q, t.apply_vjp), (rows.k, d.k, t.apply_keys_vjp)):
                grad, ds, dp = pull(x, state, dx, xp=xp, params=params)
                grads.append(grad)
                add_into(dstate, {n: sum_to(g, state[n].shape, xp=xp) for n, g in ds.items()})
                add_into(dparams, {n: sum_to(g, params[n].shape, xp=xp) for n, g in dp.items()})
            return Rows(*grads), dstate, dparams

        q = t.apply(rows.q, state, xp=xp, params=params)
        k = t.apply_keys(rows.k, state, xp=xp, params=params)
        return rows._replace(q=q, k=k), pullback


@dataclass(frozen=True)
class GaussianRows:
    """-gamma |x - y|^2 as 2 gamma x.y - gamma |y|^2 (key bias) - gamma |x|^2 (row constant).

    A common shift is subtracted from queries and keys first: at a mean of 100, the form without
    the shift loses four digits in float32.

    Attributes
    ----------
    gamma : float
        As in `pdcore.spec.kernels.Gaussian`.
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    gamma: float
    choice: Transform | None = None

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback; see `Rows`."""
        # The shift counts as a constant, as the result does not depend on it.
        shift = stop_gradient(central(rows.k, rows.key_mask, xp=xp), xp)
        return self.between(rows.q - shift, rows.k - shift, rows.key_mask, xp=xp)

    def between(self, q: Any, k: Any, key_mask: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform rows that are shifted, for backends that shift or round in another way."""

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            dq = d.q - 2.0 * self.gamma * q * d.row_constant[..., None]
            dk = d.k - 2.0 * self.gamma * k * d.key_bias[..., None]
            return Rows(dq, dk), {}, {}

        return Rows(
            q,
            k,
            # An infinite distance would hide its key from every row, from near ones too.
            key_bias=overflow_as_nan(-self.gamma * xp.sum(k * k, axis=-1), xp),
            row_constant=-self.gamma * xp.sum(q * q, axis=-1),
            key_mask=key_mask,
        ), pullback


@dataclass(frozen=True)
class KeyShift:
    """tau x.y as tau x.(y - c) and a row constant tau x.c, for keys that are then rounded.

    c is a point among the keys: what 16 bits round is k - c, which is small where k is far from 0.

    Attributes
    ----------
    scale : float
        tau.
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    scale: float
    choice: Transform | None = None

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback; see `Rows`."""
        # The shift counts as a constant, as the result does not depend on it.
        shift = stop_gradient(central(rows.k, rows.key_mask, xp=xp), xp)

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            return Rows(d.q + self.scale * d.row_constant[..., None] * shift, d.k), {}, {}

        constant = self.scale * xp.sum(rows.q * shift, axis=-1)
        return rows._replace(k=rows.k - shift, row_constant=constant), pullback


@dataclass(frozen=True)
class UnitRows:
    """The transform x / |x|; a zero vector stays zero, with zero gradient.

    Attributes
    ----------
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    choice: Transform | None = None

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback; see `Rows`."""
        units, lengths = zip(*(_unit(x, xp) for x in (rows.q, rows.k)), strict=True)

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            grads = [
                (g - u * xp.sum(u * g, axis=-1, keepdims=True)) * r
                for u, r, g in zip(units, lengths, (d.q, d.k), strict=True)
            ]
            return Rows(*grads), {}, {}

        return rows._replace(q=units[0], k=units[1]), pullback


@dataclass(frozen=True)
class FeatureRows:
    """The transform phi(x), or log phi(x) for a feature map in the log domain.

    Attributes
    ----------
    kernel : FeatureMap
        phi.
    phi : str
        The name of phi, as in `Features`.
    choice : Transform or None
        A transform that a backend's `fuse` puts in place of this one.
    """

    kernel: FeatureMap
    phi: str = ""
    choice: Transform | None = None

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback; see `Rows`."""
        phi = self.kernel

        def pullback(d: Rows) -> tuple[Rows, Gradients, Gradients]:
            grads = []
            dparams: dict[str, Any] = {}
            for x, dx in ((rows.q, d.q), (rows.k, d.k)):
                grad, dp = phi.features_vjp(x, dx, xp=xp, params=params)
                grads.append(grad)
                add_into(dparams, {n: sum_to(g, params[n].shape, xp=xp) for n, g in dp.items()})
            return Rows(*grads), {}, dparams

        q = phi.features(rows.q, xp=xp, params=params)
        k = phi.features(rows.k, xp=xp, params=params)
        return rows._replace(q=q, k=k), pullback


def _unit(x: Any, xp: Any) -> tuple[Any, Any]:
    """Compute x / |x| and 1 / |x|, both 0 for a zero vector."""
    # Scaled by the largest entry, so that squares neither overflow nor vanish; the inner
    # `where`s keep automatic differentiation free of NaN at zero vectors.
    largest = stop_gradient(xp.max(xp.abs(x), axis=-1, keepdims=True), xp)
    zero = largest == 0  # rather than `~(largest > 0)`, which would replace NaN
    divisor = xp.where(zero, xp.ones_like(largest), largest)
    scaled = x / divisor
    square = xp.sum(scaled * scaled, axis=-1, keepdims=True)
    length = xp.sqrt(xp.where(zero, xp.ones_like(square), square))
    unit = xp.where(zero, xp.zeros_like(x), scaled / length)
    return unit, xp.where(zero, xp.zeros_like(length), 1.0 / (length * divisor))


def first_real(keys: Any, mask: Any, *, xp: Any) -> Any:
    """Return the first real key of each head, (*B, H, 1, D); zeros where there is none."""
    if mask is None or not keys.shape[-2]:
        return keys[..., :1, :] if keys.shape[-2] else xp.sum(keys, axis=-2, keepdims=True)
    count = xp.cumulative_sum(xp.astype(mask, xp.int64), axis=-1)
    chosen = (mask & (count == 1))[..., None]
    return xp.sum(xp.where(chosen, keys, xp.zeros_like(keys)), axis=-2, keepdims=True)


def central(keys: Any, mask: Any, *, xp: Any) -> Any:
    """Return the median of an evenly spaced sample of the keys of each head, (*B, H, 1, D).

    It is used as a shift, on which only rounding errors depend, so a sample is enough. An outlier
    does not move it as it would move the mean. A padded key in the sample counts as the mean. A
    median that is NaN counts as 0.
    """
    length = keys.shape[-2]
    if not length:
        return xp.sum(keys, axis=-2, keepdims=True)
    # As many keys for any length, so that one trace serves all lengths.
    index = xp.arange(_SAMPLE, dtype=xp.int64, device=device_of(keys)) * length // _SAMPLE
    picked = xp.take(keys, index, axis=keys.ndim - 2)
    if mask is not None:
        real = mask[..., None]
        count = xp.astype(xp.sum(xp.astype(real, xp.int64), axis=-2, keepdims=True), keys.dtype)
        total = xp.sum(xp.where(real, keys, xp.zeros_like(keys)), axis=-2, keepdims=True)
        mean = total / xp.where(count > 0, count, xp.ones_like(count))
        picked = xp.where(xp.take(real, index, axis=real.ndim - 2), picked, mean)
    # Not by minima and maxima: XLA computes those again where they are used, with other rounding.
    middle = _SAMPLE // 2
    point = xp.sort(picked, axis=-2)[..., middle : middle + 1, :]
    return xp.where(xp.isnan(point), xp.zeros_like(point), point)
