"""An array-API namespace over `autograd.numpy`: what the reference calls to be differentiated.

`autograd.numpy` has the names of NumPy, but no gradient rule for several of the newer ones. Some of
its rules return a float64 cotangent for a float32 array, and that of `where` does not sum over what
was broadcast. The functions below replace those; every other name is that of `autograd.numpy`,
where a function without a gradient rule raises `NotImplementedError`.

A cotangent is called d, the second cotangent of a pullback's own pullback e.

Names of the standard hide those of Python here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd import extend
from autograd.extend import defvjp
from autograd.tracer import getval

# ruff: noqa: D103 - each function is the standard's

# autograd's own are subclasses, which are no dtypes.
int32, int64 = np.dtype("int32"), np.dtype("int64")

Pullback = Callable[[Any], Any]

primitive: Callable[[Callable[..., Any]], Callable[..., Any]] = extend.primitive


def __getattr__(name: str) -> Any:
    return getattr(anp, name)


class Argument:
    """An array on its way into the reference, which asks it for this namespace.

    The arrays of NumPy and autograd would name another one. What the functions below compute from
    an argument is an array of NumPy or autograd again.

    Attributes
    ----------
    value : array
        Of autograd where it is differentiated, of NumPy where it is a constant.
    """

    device = "cpu"

    def __init__(self, value: Any) -> None:
        self.value = value
        self.shape, self.dtype, self.ndim = value.shape, value.dtype, value.ndim

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return sys.modules[__name__]

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.value, dtype)

    def __getitem__(self, key: Any) -> Any:
        return self.value[key]


@primitive
def _cast(x: Any, dtype: Any) -> Any:
    return np.asarray(x).astype(dtype, copy=False)


# A cotangent is rounded as the array was: 16-bit code has no more digits on the way back.
defvjp(_cast, lambda ans, x, dtype: lambda d: _cast(_cast(d, dtype), anp.result_type(x)))


def astype(x: Any, dtype: Any, *, copy: Any = True, device: Any = None) -> Any:
    x = x.value if isinstance(x, Argument) else x
    return _cast(getval(x) if np.dtype(dtype).kind in "biu" else x, dtype)


def stop_gradient(x: Any) -> Any:
    return getval(x)


@primitive
def broadcast_to(x: Any, shape: tuple[int, ...]) -> Any:
    return np.broadcast_to(x, shape)


@primitive
def _unbroadcast(d: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Sum a cotangent to the shape of the operand that was broadcast."""
    if d.shape != shape:
        lead = d.ndim - len(shape)
        axes = [lead + i for i, n in enumerate(shape) if n == 1 and d.shape[lead + i] != 1]
        d = np.sum(d, axis=(*range(lead), *axes), keepdims=True).reshape(shape)
    return np.asarray(d).astype(dtype, copy=False)


def _like(x: Any, pullback: Pullback) -> Pullback:
    """Return a pullback whose results have the shape and the dtype of an operand."""
    shape, dtype = np.shape(getval(x)), np.result_type(getval(x))
    return lambda d: _unbroadcast(pullback(d), shape, dtype)


defvjp(broadcast_to, lambda ans, x, shape: _like(x, lambda d: d))
defvjp(
    _unbroadcast,
    lambda ans, d, shape, dtype: lambda e: _cast(broadcast_to(e, d.shape), d.dtype),
)


# --- element by element ---------------------------------------------------------------------------


@primitive
def where(condition: Any, a: Any, b: Any) -> Any:
    return np.where(condition, a, b)


# The cotangent of an entry that is not selected is 0, even where its own derivative is infinite.
defvjp(
    where,
    lambda ans, c, a, b: _like(a, lambda d: where(c, d, 0.0)),
    lambda ans, c, a, b: _like(b, lambda d: where(c, 0.0, d)),
    argnums=(1, 2),
)


@primitive
def maximum(a: Any, b: Any) -> Any:
    return np.maximum(a, b)


@primitive
def minimum(a: Any, b: Any) -> Any:
    return np.minimum(a, b)


def _winner(one: Any, other: Any, ans: Any) -> Pullback:
    """Return the pullback of one of two operands: half of the cotangent each where they tie."""
    return _like(one, lambda d: where(one == other, d / 2, where(one == ans, d, 0.0)))


for _choice in (maximum, minimum):
    defvjp(_choice, lambda ans, a, b: _winner(a, b, ans), lambda ans, a, b: _winner(b, a, ans))


# --- along axes -----------------------------------------------------------------------------------


def mean(x: Any, *, axis: Any = None, keepdims: Any = False) -> Any:
    total = anp.sum(x, axis=axis, keepdims=keepdims)
    return total / (x.size / total.size if total.size else 1.0)


@primitive
def _largest(x: Any, axis: Any) -> Any:
    return np.max(x, axis=axis, keepdims=True)


@primitive
def _smallest(x: Any, axis: Any) -> Any:
    return np.min(x, axis=axis, keepdims=True)


def _winners(ans: Any, x: Any, axis: Any) -> Pullback:
    """Return the pullback of a largest or smallest entry: equal parts for those that tie."""
    won = x == ans
    count = np.maximum(np.sum(won, axis=axis, keepdims=True, dtype=ans.dtype), 1)
    return lambda d: where(won, d / count, 0.0)


for _choice in (_largest, _smallest):
    defvjp(_choice, _winners)


def max(x: Any, *, axis: Any = None, keepdims: Any = False) -> Any:
    y = _largest(x, axis)
    return y if keepdims else anp.squeeze(y, axis=axis)


def min(x: Any, *, axis: Any = None, keepdims: Any = False) -> Any:
    y = _smallest(x, axis)
    return y if keepdims else anp.squeeze(y, axis=axis)


def cumulative_sum(x: Any, *, axis: int = -1, dtype: Any = None) -> Any:
    return anp.cumsum(x if dtype is None else astype(x, dtype), axis)


# --- shapes ---------------------------------------------------------------------------------------


def reshape(x: Any, shape: tuple[int, ...], *, copy: Any = None) -> Any:
    return anp.reshape(x, shape)


def matrix_transpose(x: Any) -> Any:
    return anp.swapaxes(x, -1, -2)


def permute_dims(x: Any, axes: tuple[int, ...]) -> Any:
    return anp.transpose(x, axes)


def concat(arrays: Sequence[Any], *, axis: int = 0) -> Any:
    return anp.concatenate(arrays, axis)


def flip(x: Any, *, axis: Any = None) -> Any:
    axes = range(x.ndim) if axis is None else np.atleast_1d(axis) % x.ndim
    return x[tuple(slice(None, None, -1 if i in axes else 1) for i in range(x.ndim))]


def take(x: Any, indices: Any, *, axis: int = 0) -> Any:
    return x[(*(slice(None),) * (axis % x.ndim), indices)]


def take_along_axis(x: Any, indices: Any, *, axis: int = -1) -> Any:
    axis = axis % x.ndim

    def with_length(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
        return (*shape[:axis], length, *shape[axis + 1 :])

    shape = np.broadcast_shapes(with_length(x.shape, 1), with_length(indices.shape, 1))
    index = np.broadcast_to(indices, with_length(shape, indices.shape[axis]))
    places: list[Any] = list(np.indices(index.shape, sparse=True))
    places[axis] = index
    return broadcast_to(x, with_length(shape, x.shape[axis]))[tuple(places)]
