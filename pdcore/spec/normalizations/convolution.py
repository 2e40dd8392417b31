"""Attention-Conv1D and Attention-Conv2D: keys convolved along their sequence or over a grid."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...arrays import device_of
from ...errors import SpecError, nearest
from ..kernel_base import Parameter
from ..statistics import KeySet, State, Statistics
from .base import Normalization

__all__ = ["Conv1d", "Conv2d", "Convolution"]

_PADDINGS = ("same", "causal")


class Convolution(Normalization):
    """A depthwise convolution of the keys, with zeros outside them and for keys that are not real.

    Only a sequence can be convolved. A query is a single point without neighbours, so T(q) = q;
    the convolution of a layer changes the points that the layer is fitted on.
    """

    @property
    @abstractmethod
    def taps(self) -> tuple[int, ...]:
        """The sizes of the filter."""

    @property
    @abstractmethod
    def before(self) -> tuple[int, ...]:
        """The number of taps before the key itself, for each axis of the filter."""

    @abstractmethod
    def grid(self, count: int) -> tuple[int, ...]:
        """Return the shape of the grid that `count` keys fill in C order."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a key is convolved with later keys."""
        return any(size - 1 > back for size, back in zip(self.taps, self.before, strict=True))

    @property
    def leaks(self) -> bool:
        """Whether T of a key depends on later keys, unless the caller allows it."""
        return self.looks_ahead and not getattr(self, "allow_leak", False)

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declaration of ``weight``; by default all taps have equal weight."""
        share = 1.0 / math.prod(self.taps)
        return (Parameter("weight", (("H", *self.taps, "D"),), default=share),)

    def statistics_state(self) -> Statistics:
        """Return the set of all keys."""
        return KeySet()

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Return the query unchanged."""
        return x

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull a cotangent back, see `Normalization.apply_vjp`."""
        return cotangent, {}, {}

    def apply_keys(self, keys: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T of the keys, see `Normalization.apply_keys`."""
        x = self._on_grid(xp.where(state["mask"], keys, xp.zeros_like(keys)), xp)
        return xp.reshape(convolve(x, params["weight"], self.before, xp=xp), keys.shape)

    def apply_keys_vjp(
        self, keys: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull a cotangent back, see `Normalization.apply_keys_vjp`."""
        mask, weight = state["mask"], params["weight"]
        x = self._on_grid(xp.where(mask, keys, xp.zeros_like(keys)), xp)
        dx, dweight = convolve_vjp(x, weight, self.before, self._on_grid(cotangent, xp), xp=xp)
        dx = xp.reshape(dx, keys.shape)
        return xp.where(mask, dx, xp.zeros_like(dx)), {}, {"weight": dweight}

    def check_keys(self, count: int) -> None:
        """Raise for a number of keys that does not fill the grid."""
        if math.prod(self.grid(count)) != count:
            raise ValueError(
                f"k: got {count} keys in a head, expected "
                f"{' x '.join(map(str, self.grid(count)))} = {math.prod(self.grid(count))}, the "
                f"grid of {self.word}: give it the height and width that the keys fill"
            )

    def step(self) -> str:
        """Return the text of the step, see `Normalization.step`."""
        return f"convolve: keys by {self.word}, zeros beyond them; queries as they are"

    def choices(self, *, pooled: bool) -> Iterator[str]:
        """Yield the choice of this project, see `Normalization.choices`."""
        yield "the convolution: of keys alone, depthwise, with zeros beyond them"

    def layer_note(self) -> str:
        """Return what a convolution does to keys, and to a query."""
        return (
            f"Key j stands at tap c = {self.before[0]}. A convolution is of the key sequence, so "
            "it changes the points that the layer is fitted on; a query is one point, without "
            "neighbours, and T leaves it. "
        )

    def latex(self, key: str = "k") -> str:
        """Return T of key j as LaTeX; `key` is the symbol of keys."""
        return rf"\sum_t w_t \odot {key}_{{j + t}}"

    def _on_grid(self, x: Any, xp: Any) -> Any:
        """Reshape keys (*B, H, M, D) to the grid, (*B, H, *grid, D)."""
        return xp.reshape(x, (*x.shape[:-2], *self.grid(x.shape[-2]), x.shape[-1]))


@dataclass(frozen=True)
class Conv1d(Convolution):
    """T(k_j) = sum_t w_t k_(j + t - c), and T(q) = q: keys convolved along their sequence.

    Attention-Conv1D. The filter is depthwise: a weight for each head, tap and feature. Keys
    outside the sequence, and padding, count as zeros. A query has no neighbours, so T(q) = q.
    With head scaling, the pooled keys are convolved. This definition is this project's own.

    The call's `params` may have ``weight``, (Hkv, size, D), with taps in the order of the keys;
    without it, every tap has weight 1 / size.

    Parameters
    ----------
    size : int
        The number of taps, >= 1.
    padding : {"same", "causal"}
        Whether key j is at the middle tap, c = (size - 1) // 2, or at the last tap, so that
        T(k_j) does not depend on later keys.
    allow_leak : bool
        Permit ``same`` under ``causal``.
    """

    size: int = 3
    padding: str = "same"
    allow_leak: bool = False
    word = "conv1d"
    layer = "conv1d"
    causal_choice = "padding=causal"

    def __post_init__(self) -> None:
        _check_sizes(self, "size")
        if self.padding not in _PADDINGS:
            raise SpecError(
                f"conv1d: padding is {self.padding!r}; {nearest(str(self.padding), _PADDINGS)}"
            )

    @property
    def taps(self) -> tuple[int, ...]:
        """The sizes of the filter."""
        return (self.size,)

    @property
    def before(self) -> tuple[int, ...]:
        """The number of taps before the key itself."""
        return (self.size - 1 if self.padding == "causal" else (self.size - 1) // 2,)

    def grid(self, count: int) -> tuple[int, ...]:
        """Return ``(count,)``: a sequence has any number of keys."""
        return (count,)

    def latex(self, key: str = "k") -> str:
        """Return T of key j as LaTeX; `key` is the symbol of keys."""
        at = f"j + t - {self.before[0]}" if self.before[0] else "j + t"
        return rf"\sum_{{t = 0}}^{{{self.size - 1}}} w_t \odot {key}_{{{at}}}"


@dataclass(frozen=True)
class Conv2d(Convolution):
    """T(k_j) = sum_ut w_ut k_(j + (u - c) width + t - c), and T(q) = q: keys convolved over a grid.

    Attention-Conv2D. The keys of a head, pooled or not, fill a grid row by row, and are convolved
    over it with a square depthwise filter, as in `Conv1d`. T(k_j) depends on later keys, so
    ``causal`` refuses it. This definition is this project's own.

    The call's `params` may have ``weight``, (Hkv, size, size, D), with taps down and across;
    without it, every tap has weight 1 / size^2.

    Parameters
    ----------
    height, width : int
        The grid, >= 1: a head has height width keys.
    size : int
        The filter's height and width, >= 1; key j is at its middle, c = (size - 1) // 2.
    allow_leak : bool
        Permit the convolution under ``causal``.
    """

    height: int
    width: int
    size: int = 3
    allow_leak: bool = False
    word = "conv2d"
    layer = "conv2d"

    def __post_init__(self) -> None:
        _check_sizes(self, "height", "width", "size")

    @property
    def taps(self) -> tuple[int, ...]:
        """The sizes of the filter."""
        return self.size, self.size

    @property
    def before(self) -> tuple[int, ...]:
        """The number of taps before the key itself, down and across."""
        return (self.size - 1) // 2, (self.size - 1) // 2

    def grid(self, count: int) -> tuple[int, ...]:
        """Return ``(height, width)``, for any number of keys."""
        return self.height, self.width

    def latex(self, key: str = "k") -> str:
        """Return T of key j as LaTeX; `key` is the symbol of keys."""
        c = self.before[0]
        at = f"j + {self.width}(u - {c}) + t - {c}" if c else f"j + {self.width}u + t"
        return (
            rf"\sum_{{u, t = 0}}^{{{self.size - 1}}} w_{{ut}} \odot {key}_{{{at}}} "
            rf"\ \text{{ within rows }} 0 \text{{ to }} {self.height - 1} \text{{ and columns }} 0 "
            rf"\text{{ to }} {self.width - 1}"
        )


def convolve(x: Any, weight: Any, before: tuple[int, ...], *, xp: Any) -> Any:
    """Compute sum_t weight_t x_(i + t - before) over the taps t: a cross-correlation.

    Parameters
    ----------
    x : array (*B, H, *grid, D)
        Points outside the grid count as zeros.
    weight : array (H, *taps, D)
        One axis of taps for each axis of the grid.
    before : tuple of int
        The tap of the point i itself, for each axis.
    xp : namespace
        The array-API namespace.

    Returns
    -------
    array like `x`
    """
    total: Any = None
    for tap, window in _windows(x, weight.shape[1:-1], before, xp):
        part = window * _broadcastable(weight[(slice(None), *tap, ...)], len(before), xp)
        total = part if total is None else total + part
    return total


def convolve_vjp(
    x: Any, weight: Any, before: tuple[int, ...], cotangent: Any, *, xp: Any
) -> tuple[Any, Any]:
    """Pull a cotangent of `convolve` back to x and weight, for weight not summed over *B."""
    axes = tuple(range(1, weight.ndim - 1))
    after = tuple(n - 1 - b for n, b in zip(weight.shape[1:-1], before, strict=True))
    dx = convolve(cotangent, xp.flip(weight, axis=axes), after, xp=xp)
    over = tuple(range(-1 - len(before), -1))
    parts = [
        xp.sum(cotangent * window, axis=over)
        for _, window in _windows(x, weight.shape[1:-1], before, xp)
    ]
    dweight = xp.stack(parts, axis=-2)
    return dx, xp.reshape(dweight, (*dweight.shape[:-2], *weight.shape[1:]))


def _windows(
    x: Any, taps: tuple[int, ...], before: tuple[int, ...], xp: Any
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield every tap with the array, like x, of the points that it multiplies."""
    first = x.ndim - 1 - len(taps)
    grid, padded = x.shape[first:-1], x
    for axis, (size, back) in enumerate(zip(taps, before, strict=True), first):
        padded = xp.concat(
            [_zeros(padded, axis, back, xp), padded, _zeros(padded, axis, size - 1 - back, xp)],
            axis=axis,
        )
    for tap in itertools.product(*map(range, taps)):
        slices = tuple(slice(t, t + n) for t, n in zip(tap, grid, strict=True))
        yield tap, padded[(..., *slices, slice(None))]


def _zeros(x: Any, axis: int, count: int, xp: Any) -> Any:
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    return xp.zeros(shape, dtype=x.dtype, device=device_of(x))


def _broadcastable(weight: Any, axes: int, xp: Any) -> Any:
    """Reshape (H, D) to (H, 1, ..., D), with a 1 for each axis of the grid."""
    return xp.reshape(weight, (weight.shape[0], *(1,) * axes, weight.shape[1]))


def _check_sizes(t: Convolution, *names: str) -> None:
    for name in names:
        value = getattr(t, name)
        if type(value) is not int or value < 1:
            raise SpecError(f"{t.word}: {name} is {value!r}, expected a whole number >= 1")
