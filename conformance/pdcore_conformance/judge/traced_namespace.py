"""The array API over `pdcore_conformance.judge.differentiate.Traced`: what the reference calls.

A module, as array-API namespaces are. Names of the standard hide those of Python here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .differentiate import Array, Traced, binary, lifted, multiply, sum_to, unary, value_of

# ruff: noqa: D103 - each function is the standard's

pi, e, inf, nan, newaxis = math.pi, math.e, math.inf, math.nan, None
bool, int32, int64 = np.dtype("bool"), np.dtype("int32"), np.dtype("int64")
float16, float32, float64 = np.dtype("float16"), np.dtype("float32"), np.dtype("float64")

Pull = Callable[[Array], Array]
Axis = Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotImplementedError(
        f"the gradient oracle has no {name}: add it to {__name__}, with its pullback"
    )


# --- element by element ---------------------------------------------------------------------------


def exp(x: Traced) -> Traced:
    return unary(np.exp, x, lambda x, y: y)


def expm1(x: Traced) -> Traced:
    return unary(np.expm1, x, lambda x, y: y + 1)


def log(x: Traced) -> Traced:
    return unary(np.log, x, lambda x, y: 1 / x)


def log1p(x: Traced) -> Traced:
    return unary(np.log1p, x, lambda x, y: 1 / (1 + x))


def tanh(x: Traced) -> Traced:
    return unary(np.tanh, x, lambda x, y: 1 - y * y)


def sqrt(x: Traced) -> Traced:
    return unary(np.sqrt, x, lambda x, y: 1 / (2 * y))


def sin(x: Traced) -> Traced:
    return unary(np.sin, x, lambda x, y: np.cos(x))


def cos(x: Traced) -> Traced:
    return unary(np.cos, x, lambda x, y: -np.sin(x))


def abs(x: Traced) -> Traced:
    return x.__abs__()


def square(x: Traced) -> Traced:
    return x * x


def sign(x: Traced) -> Traced:
    return Traced(np.sign(x.value))


def floor(x: Traced) -> Traced:
    return Traced(np.floor(x.value))


def isfinite(x: Traced) -> Traced:
    return Traced(np.isfinite(x.value))


def isnan(x: Traced) -> Traced:
    return Traced(np.isnan(x.value))


def add(a: Any, b: Any) -> Traced:
    result: Traced = lifted(a, b) + b
    return result


def subtract(a: Any, b: Any) -> Traced:
    result: Traced = lifted(a, b) - b
    return result


def divide(a: Any, b: Any) -> Traced:
    result: Traced = lifted(a, b) / b
    return result


def matmul(a: Any, b: Any) -> Traced:
    return multiply(a, b)


def maximum(a: Any, b: Any) -> Traced:
    return _larger(np.maximum, a, b)


def minimum(a: Any, b: Any) -> Traced:
    return _larger(np.minimum, a, b)


def _larger(operation: Any, a: Any, b: Any) -> Traced:
    # Half of the cotangent each where they tie: any split is a subgradient.
    def share(d: Array, one: Any, other: Any) -> Array:
        won = np.where(operation(one, other) == one, d, 0)
        return np.where(one == other, d / 2, won).astype(d.dtype)

    return binary(operation, a, b, lambda d, x, y: share(d, x, y), lambda d, x, y: share(d, y, x))


def clip(x: Traced, min: Any = None, max: Any = None) -> Traced:
    y = np.clip(x.value, value_of(min), value_of(max))
    return Traced(y, [(x, lambda d: np.where(y == x.value, d, np.zeros((), d.dtype)))])


def where(condition: Any, a: Any, b: Any) -> Traced:
    """Select; the cotangent of what is not selected is 0, whatever it was computed from."""
    c = value_of(condition)

    def pull(chosen: Array, shape: tuple[int, ...]) -> Pull:
        return lambda d: sum_to(np.where(chosen, d, np.zeros((), d.dtype)), shape)

    parents: list[tuple[Traced, Pull]] = []
    if isinstance(a, Traced):
        parents.append((a, pull(c, a.shape)))
    if isinstance(b, Traced):
        parents.append((b, pull(~c, b.shape)))
    return Traced(np.where(c, value_of(a), value_of(b)), parents)


def astype(x: Traced, dtype: Any, *, copy: Any = True, device: Any = None) -> Traced:
    # A cotangent goes back through the same dtype: what honest 16-bit code can do.
    floating = _is_floating(x.dtype) and _is_floating(np.dtype(dtype))
    parents = [(x, lambda d: d.astype(dtype).astype(x.dtype))] if floating else []
    return Traced(x.value.astype(dtype), parents)


def _is_floating(dtype: Any) -> Any:
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def stop_gradient(x: Traced) -> Traced:
    return Traced(x.value)


# --- along axes -----------------------------------------------------------------------------------


def sum(x: Traced, *, axis: Axis = None, keepdims: Any = False, dtype: Any = None) -> Traced:
    def pull(d: Array) -> Array:
        return np.broadcast_to(_spread(d, axis, keepdims), x.shape)

    return Traced(x.value.sum(axis=axis, keepdims=keepdims, dtype=dtype), [(x, pull)])


def mean(x: Traced, *, axis: Axis = None, keepdims: Any = False) -> Traced:
    total = sum(x, axis=axis, keepdims=keepdims)
    return total / (x.size / total.size if total.size else 1.0)


def max(x: Traced, *, axis: Axis = None, keepdims: Any = False) -> Traced:
    return _extreme(np.max, x, axis, keepdims)


def min(x: Traced, *, axis: Axis = None, keepdims: Any = False) -> Traced:
    return _extreme(np.min, x, axis, keepdims)


def _extreme(pick: Any, x: Traced, axis: Axis, keepdims: Any) -> Traced:
    y = pick(x.value, axis=axis, keepdims=True)

    def pull(d: Array) -> Array:
        hit = (x.value == y).astype(d.dtype)
        count = np.maximum(hit.sum(axis=axis, keepdims=True), 1)
        return np.asarray(_spread(d, axis, keepdims) * hit / count)

    return Traced(y if keepdims else np.squeeze(y, axis=axis), [(x, pull)])


def _spread(d: Array, axis: Axis, keepdims: Any) -> Array:
    return d if axis is None or keepdims else np.expand_dims(d, axis)


def any(x: Traced, *, axis: Axis = None, keepdims: Any = False) -> Traced:
    return Traced(np.any(x.value, axis=axis, keepdims=keepdims))


def all(x: Traced, *, axis: Axis = None, keepdims: Any = False) -> Traced:
    return Traced(np.all(x.value, axis=axis, keepdims=keepdims))


def cumulative_sum(
    x: Traced, *, axis: int | None = None, dtype: Any = None, include_initial: Any = False
) -> Traced:
    at = -1 if axis is None else axis
    y = np.cumulative_sum(x.value, axis=at, dtype=dtype, include_initial=include_initial)

    def pull(d: Array) -> Array:
        if include_initial:
            d = d.take(np.arange(1, d.shape[at]), axis=at)
        return np.flip(np.cumsum(np.flip(d, at), axis=at), at)

    return Traced(y, [(x, pull)])


# --- shapes ---------------------------------------------------------------------------------------


def matrix_transpose(x: Traced) -> Traced:
    return x.mT


def reshape(x: Traced, shape: tuple[int, ...], *, copy: Any = None) -> Traced:
    return Traced(x.value.reshape(shape), [(x, lambda d: d.reshape(x.shape))])


def broadcast_to(x: Traced, shape: tuple[int, ...]) -> Traced:
    return Traced(np.broadcast_to(x.value, shape), [(x, lambda d: sum_to(d, x.shape))])


def expand_dims(x: Traced, *, axis: int = 0) -> Traced:
    return Traced(np.expand_dims(x.value, axis), [(x, lambda d: np.squeeze(d, axis))])


def squeeze(x: Traced, axis: Any) -> Traced:
    return Traced(np.squeeze(x.value, axis), [(x, lambda d: d.reshape(x.shape))])


def permute_dims(x: Traced, axes: tuple[int, ...]) -> Traced:
    return Traced(x.value.transpose(axes), [(x, lambda d: d.transpose(np.argsort(axes)))])


def flip(x: Traced, *, axis: Axis = None) -> Traced:
    return Traced(np.flip(x.value, axis), [(x, lambda d: np.flip(d, axis))])


def concat(arrays: Sequence[Any], *, axis: int = 0) -> Traced:
    parts = [x if isinstance(x, Traced) else Traced(x) for x in arrays]
    ends = np.cumsum([x.shape[axis] for x in parts])

    def pull(end: int, size: int) -> Pull:
        return lambda d: d.take(np.arange(end - size, end), axis=axis)

    parents = [(x, pull(end, x.shape[axis])) for x, end in zip(parts, ends, strict=True)]
    return Traced(np.concatenate([x.value for x in parts], axis=axis), parents)


def stack(arrays: Sequence[Any], *, axis: int = 0) -> Traced:
    def pull(i: int) -> Pull:
        return lambda d: d.take(i, axis=axis)

    parents = [(x, pull(i)) for i, x in enumerate(arrays)]
    return Traced(np.stack([x.value for x in arrays], axis=axis), parents)


def take(x: Traced, indices: Any, *, axis: int | None = None) -> Traced:
    index = np.asarray(value_of(indices))
    at = 0 if axis is None else axis % x.ndim

    def pull(d: Array) -> Array:
        full = np.zeros(x.shape, d.dtype)
        places: Any = (*(slice(None),) * at, index)
        np.add.at(full, places, d)
        return full

    return Traced(np.take(x.value, index, axis=at), [(x, pull)])


def take_along_axis(x: Traced, indices: Any, *, axis: int = -1) -> Traced:
    index, at = value_of(indices), axis % x.ndim

    def pull(d: Array) -> Array:
        # Broadcast as NumPy does, on every axis but the one taken along.
        def one(shape: tuple[int, ...]) -> tuple[int, ...]:
            return (*shape[:at], 1, *shape[at + 1 :])

        common = np.broadcast_shapes(one(x.shape), one(index.shape))
        wide = (*common[:at], index.shape[at], *common[at + 1 :])
        full = np.zeros((*common[:at], x.shape[at], *common[at + 1 :]), d.dtype)
        places: list[Any] = list(np.indices(wide, sparse=True))
        places[at] = np.broadcast_to(index, wide)
        np.add.at(full, tuple(places), d)
        return sum_to(full, x.shape)

    return Traced(np.take_along_axis(x.value, index, axis=axis), [(x, pull)])


# --- constants ------------------------------------------------------------------------------------


def asarray(x: Any, *, dtype: Any = None, device: Any = None, copy: Any = None) -> Traced:
    return x if isinstance(x, Traced) and dtype is None else Traced(np.asarray(value_of(x), dtype))


def arange(
    start: Any, stop: Any = None, step: Any = 1, *, dtype: Any = None, device: Any = None
) -> Traced:
    bounds: Any = (0, start) if stop is None else (start, stop)
    made: Any = np.arange
    return Traced(made(*bounds, step, dtype=dtype))


def full(shape: Any, value: Any, *, dtype: Any = None, device: Any = None) -> Traced:
    return Traced(np.full(shape, value_of(value), dtype))


def zeros(shape: Any, *, dtype: Any = None, device: Any = None) -> Traced:
    return Traced(np.zeros(shape, dtype))


def ones(shape: Any, *, dtype: Any = None, device: Any = None) -> Traced:
    return Traced(np.ones(shape, dtype))


def full_like(x: Traced, value: Any, *, dtype: Any = None, device: Any = None) -> Traced:
    return full(x.shape, value, dtype=dtype or x.dtype)


def zeros_like(x: Traced, *, dtype: Any = None, device: Any = None) -> Traced:
    return zeros(x.shape, dtype=dtype or x.dtype)


def ones_like(x: Traced, *, dtype: Any = None, device: Any = None) -> Traced:
    return ones(x.shape, dtype=dtype or x.dtype)


def eye(
    rows: int, columns: int | None = None, *, k: int = 0, dtype: Any = None, device: Any = None
) -> Traced:
    return Traced(np.eye(rows, columns, k, dtype))
