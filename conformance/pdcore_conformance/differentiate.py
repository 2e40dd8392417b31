"""Gradients of the reference, in NumPy alone: the oracle of the gradient cases.

A small reverse mode over the array API. It is our own, where a library would do for the rest of
the suite, because the oracle of a float64 case is ``numpy.longdouble``, which no framework has,
because the reference asks its arrays for an array-API namespace, which HIPS autograd's do not
have, and because an environment with NumPy only has to be able to judge gradients.

A `Traced` array remembers what it was computed from; `gradients` walks back. Integers and
booleans carry no gradient. A function that is not here raises an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Traced", "constants", "gradients"]

Array = np.ndarray[Any, Any]
Pull = Callable[[Array], Array]


class Traced:
    """A NumPy array that remembers how it was computed.

    Attributes
    ----------
    value : numpy.ndarray
    parents : list of (Traced, callable)
        What it was computed from, each with the function that pulls a cotangent back to it.
    """

    __slots__ = ("parents", "value")
    __array_priority__ = 1000.0
    __array_ufunc__ = None  # NumPy arrays and scalars leave operators to us

    def __init__(self, value: Any, parents: Sequence[tuple[Traced, Pull]] = ()) -> None:
        self.value = np.asarray(value)
        self.parents = [(x, pull) for x, pull in parents if x.tracked] if parents else []

    @property
    def tracked(self) -> bool:
        """Whether a gradient can pass through it: it is floating, and not a constant."""
        return self.parents is not None and (bool(self.parents) or isinstance(self, _Leaf))

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return xp

    def __repr__(self) -> str:
        return f"Traced({self.value!r})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """The dtype."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.value.ndim

    @property
    def size(self) -> int:
        """The number of entries."""
        return self.value.size

    @property
    def device(self) -> str:
        """Where it is: where NumPy is."""
        return "cpu"

    @property
    def T(self) -> Traced:  # noqa: N802 - the array API's name
        """The transpose."""
        return matrix_transpose(self)

    @property
    def mT(self) -> Traced:  # noqa: N802 - the array API's name
        """The transpose of the last two axes."""
        return matrix_transpose(self)

    def __getitem__(self, key: Any) -> Traced:
        index = key if isinstance(key, tuple) else (key,)
        index = tuple(x.value if isinstance(x, Traced) else x for x in index)

        def pull(d: Array) -> Array:
            full = np.zeros(self.shape, d.dtype)
            np.add.at(full, index, d)
            return full

        def place(d: Array) -> Array:  # no entry is read twice, so assignment will do
            full = np.zeros(self.shape, d.dtype)
            full[index] = d
            return full

        basic = all(x is None or x is Ellipsis or isinstance(x, (int, slice)) for x in index)
        return Traced(self.value[index], [(self, place if basic else pull)])

    def __bool__(self) -> bool:
        return bool(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __neg__(self) -> Traced:
        return Traced(-self.value, [(self, lambda d: -d)])

    def __abs__(self) -> Traced:
        return xp.abs(self)

    def __invert__(self) -> Traced:
        return Traced(~self.value)

    def __add__(self, other: Any) -> Traced:
        return _binary(np.add, self, other, lambda d, a, b: d, lambda d, a, b: d)

    def __sub__(self, other: Any) -> Traced:
        return _binary(np.subtract, self, other, lambda d, a, b: d, lambda d, a, b: -d)

    def __mul__(self, other: Any) -> Traced:
        return _binary(np.multiply, self, other, lambda d, a, b: d * b, lambda d, a, b: d * a)

    def __truediv__(self, other: Any) -> Traced:
        return _binary(
            np.true_divide, self, other, lambda d, a, b: d / b, lambda d, a, b: -d * a / (b * b)
        )

    def __pow__(self, other: Any) -> Traced:
        def base(d: Array, a: Array, b: Array) -> Array:
            return d * b * a ** (b - 1)

        def exponent(d: Array, a: Array, b: Array) -> Array:
            return d * a**b * np.log(np.where(a > 0, a, 1))

        return _binary(np.power, self, other, base, exponent)

    def __matmul__(self, other: Any) -> Traced:
        return matmul(self, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> Traced:
        return _lift(other, self) - self

    def __rtruediv__(self, other: Any) -> Traced:
        return _lift(other, self) / self

    def __rpow__(self, other: Any) -> Traced:
        return _lift(other, self) ** self

    def __rmatmul__(self, other: Any) -> Traced:
        return matmul(_lift(other, self), self)

    def __lt__(self, other: Any) -> Traced:
        return Traced(self.value < _value(other))

    def __le__(self, other: Any) -> Traced:
        return Traced(self.value <= _value(other))

    def __gt__(self, other: Any) -> Traced:
        return Traced(self.value > _value(other))

    def __ge__(self, other: Any) -> Traced:
        return Traced(self.value >= _value(other))

    def __eq__(self, other: object) -> Any:
        return Traced(self.value == _value(other))

    def __ne__(self, other: object) -> Any:
        return Traced(self.value != _value(other))

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Any) -> Traced:
        return Traced(self.value & _value(other))

    def __or__(self, other: Any) -> Traced:
        return Traced(self.value | _value(other))

    __rand__ = __and__
    __ror__ = __or__

    def __floordiv__(self, other: Any) -> Traced:
        return Traced(self.value // _value(other))

    def __mod__(self, other: Any) -> Traced:
        return Traced(self.value % _value(other))


class _Leaf(Traced):
    """An array to differentiate by."""

    __slots__ = ()


def gradients(
    function: Callable[[Mapping[str, Any]], Sequence[Any]],
    arrays: Mapping[str, Array],
    cotangents: Sequence[Array | None],
) -> tuple[list[Array], dict[str, Array]]:
    """Evaluate a function of arrays, and pull cotangents of its results back.

    Parameters
    ----------
    function : callable
        Takes a mapping of `Traced` arrays, gives results computed from them.
    arrays : mapping of str to array
        What to differentiate by.
    cotangents : sequence of array or None
        One for each result, of its shape.

    Returns
    -------
    results : list of array
    gradients : dict of str to array
        In the shapes and dtypes of `arrays`; zeros where nothing depends on one.
    """
    leaves = {name: _Leaf(x) for name, x in arrays.items()}
    with np.errstate(all="ignore"):
        results = function(leaves)
        found: dict[int, Array] = {}
        for result, d in zip(results, cotangents, strict=True):
            if d is not None and result.tracked:
                _accumulate(found, result, np.asarray(d).astype(result.dtype))
        for node in _order([r for r in results if r.tracked]):
            d = found.get(id(node)) if isinstance(node, _Leaf) else found.pop(id(node), None)
            if d is None:
                continue
            for parent, pull in node.parents:
                _accumulate(found, parent, pull(d))
    return [r.value for r in results], {
        name: found.get(id(leaf), np.zeros(leaf.shape, leaf.dtype)).astype(leaf.dtype)
        for name, leaf in leaves.items()
    }


def constants(x: Any) -> Any:
    """Let an array take part in a differentiated call, as a constant; leave anything else."""
    return Traced(x) if isinstance(x, np.ndarray) else x


def _accumulate(found: dict[int, Array], node: Traced, d: Array) -> None:
    known = found.get(id(node))
    found[id(node)] = d if known is None else known + d


def _order(results: list[Traced]) -> list[Traced]:
    """List everything the results were computed from, each before what it was computed from."""
    seen: set[int] = set()
    order: list[Traced] = []
    stack = [(node, False) for node in results]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.parents)
    return order[::-1]


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Traced) else x


def _lift(x: Any, like: Traced) -> Traced:
    return x if isinstance(x, Traced) else Traced(np.asarray(x, like.dtype))


def _sum_to(d: Array, shape: tuple[int, ...]) -> Array:
    """Sum what was broadcast."""
    if d.shape == shape:
        return d
    d = d.sum(axis=tuple(range(d.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and d.shape[i] != 1)
    return d.sum(axis=axes, keepdims=True) if axes else d


def _binary(operation: Any, a: Any, b: Any, pull_a: Any, pull_b: Any) -> Traced:
    x, y = _value(a), _value(b)
    parents: list[tuple[Traced, Pull]] = []
    if isinstance(a, Traced):
        parents.append((a, lambda d: _sum_to(pull_a(d, x, y), a.shape)))
    if isinstance(b, Traced):
        parents.append((b, lambda d: _sum_to(pull_b(d, x, y), b.shape)))
    return Traced(operation(x, y), parents)


def _unary(operation: Any, x: Any, slope: Callable[[Array, Array], Array]) -> Traced:
    y = operation(x.value)
    return Traced(y, [(x, lambda d: d * slope(x.value, y))])


def matmul(a: Any, b: Any) -> Traced:
    """Multiply matrices."""

    def left(d: Array, x: Array, y: Array) -> Array:
        return np.matmul(d, y.swapaxes(-1, -2))

    def right(d: Array, x: Array, y: Array) -> Array:
        return np.matmul(x.swapaxes(-1, -2), d)

    return _binary(np.matmul, a, b, left, right)


def matrix_transpose(x: Traced) -> Traced:
    """Swap the last two axes."""
    return Traced(x.value.swapaxes(-1, -2), [(x, lambda d: d.swapaxes(-1, -2))])


def where(condition: Any, a: Any, b: Any) -> Traced:
    """Select; the cotangent of what is not selected is 0, whatever it was computed from."""
    c = _value(condition)

    def pull(chosen: Array, shape: tuple[int, ...]) -> Pull:
        return lambda d: _sum_to(np.where(chosen, d, np.zeros((), d.dtype)), shape)

    parents: list[tuple[Traced, Pull]] = []
    if isinstance(a, Traced):
        parents.append((a, pull(c, a.shape)))
    if isinstance(b, Traced):
        parents.append((b, pull(~c, b.shape)))
    return Traced(np.where(c, _value(a), _value(b)), parents)


def _sum(x: Traced, *, axis: Any = None, keepdims: bool = False, dtype: Any = None) -> Traced:
    # NumPy sums integers in a wider dtype, and so does the standard.
    y = x.value.sum(axis=axis, keepdims=keepdims, dtype=dtype)

    def pull(d: Array) -> Array:
        if axis is not None and not keepdims:
            d = np.expand_dims(d, axis)
        return np.broadcast_to(d, x.shape)

    return Traced(y, [(x, pull)])


def _extreme(pick: Any) -> Any:
    def extreme(x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
        y = pick(x.value, axis=axis, keepdims=True)

        def pull(d: Array) -> Array:
            if axis is not None and not keepdims:
                d = np.expand_dims(d, axis)
            hit = (x.value == y).astype(d.dtype)
            return d * hit / np.maximum(hit.sum(axis=axis, keepdims=True), 1)

        found = y if keepdims else np.squeeze(y, axis=axis)
        return Traced(found, [(x, pull)])

    return extreme


def _astype(x: Traced, dtype: Any, *, copy: bool = True, device: Any = None) -> Traced:
    # A cotangent takes the way back through the same dtype: what honest 16-bit code can do.
    floating = _is_floating(x.dtype) and _is_floating(np.dtype(dtype))
    parents = [(x, lambda d: d.astype(dtype).astype(x.dtype))] if floating else []
    return Traced(x.value.astype(dtype), parents)


def _is_floating(dtype: Any) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def _concat(arrays: Sequence[Any], *, axis: int = 0) -> Traced:
    arrays = [x if isinstance(x, Traced) else Traced(x) for x in arrays]
    starts = np.cumsum([0, *(x.shape[axis] for x in arrays)])

    def pull(first: int, last: int) -> Pull:
        return lambda d: d.take(np.arange(first, last), axis=axis)

    parents = [
        (x, pull(first, last))
        for x, first, last in zip(arrays, starts[:-1], starts[1:], strict=True)
    ]
    return Traced(np.concatenate([x.value for x in arrays], axis=axis), parents)


def _stack(arrays: Sequence[Any], *, axis: int = 0) -> Traced:
    def pull(i: int) -> Pull:
        return lambda d: d.take(i, axis=axis)

    parents = [(x, pull(i)) for i, x in enumerate(arrays)]
    return Traced(np.stack([x.value for x in arrays], axis=axis), parents)


def _cumulative_sum(x: Traced, *, axis: int | None = None, dtype: Any = None,
                    include_initial: bool = False) -> Traced:  # fmt: skip
    at = -1 if axis is None else axis
    y = np.cumulative_sum(x.value, axis=at, dtype=dtype, include_initial=include_initial)

    def pull(d: Array) -> Array:
        if include_initial:
            d = d.take(np.arange(1, d.shape[at]), axis=at)
        return np.flip(np.cumsum(np.flip(d, at), axis=at), at)

    return Traced(y, [(x, pull)])


def _take(x: Traced, indices: Any, *, axis: int | None = None) -> Traced:
    index = np.asarray(_value(indices))
    at = 0 if axis is None else axis % x.ndim

    def pull(d: Array) -> Array:
        full = np.zeros(x.shape, d.dtype)
        np.add.at(full, (*(slice(None),) * at, index), d)
        return full

    return Traced(np.take(x.value, index, axis=at), [(x, pull)])


def _take_along_axis(x: Traced, indices: Any, *, axis: int = -1) -> Traced:
    index = _value(indices)

    def pull(d: Array) -> Array:
        # Broadcast as NumPy does: every axis but the one taken along.
        at = axis % x.ndim
        shape = list(np.broadcast_shapes(
            (*x.shape[:at], 1, *x.shape[at + 1 :]), (*index.shape[:at], 1, *index.shape[at + 1 :])
        ))  # fmt: skip
        shape[at] = index.shape[at]
        wide = np.broadcast_to(index, shape)
        full_shape = [*shape]
        full_shape[at] = x.shape[at]
        full = np.zeros(full_shape, d.dtype)
        places = list(np.indices(shape, sparse=True))
        places[at] = wide
        np.add.at(full, tuple(places), d)
        return _sum_to(full, x.shape)

    return Traced(np.take_along_axis(x.value, index, axis=axis), [(x, pull)])


def _elementwise_extreme(operation: Any) -> Any:
    def extreme(a: Any, b: Any) -> Traced:
        # Half of the cotangent each where they tie: any split is a subgradient.
        def share(d: Array, chosen: Array, other: Array) -> Array:
            return np.where(
                chosen == other, d / 2, np.where(operation(chosen, other) == chosen, d, 0)
            ).astype(d.dtype)

        return _binary(
            operation, a, b, lambda d, x, y: share(d, x, y), lambda d, x, y: share(d, y, x)
        )

    return extreme


def _clip(x: Traced, min: Any = None, max: Any = None) -> Traced:
    low, high = _value(min), _value(max)
    y = np.clip(x.value, low, high)
    return Traced(y, [(x, lambda d: np.where(y == x.value, d, np.zeros((), d.dtype)))])


class _Namespace:
    """The array API over `Traced`."""

    __name__ = __name__
    pi, e, inf, nan, newaxis = math.pi, math.e, math.inf, math.nan, None
    bool, int32, int64 = np.dtype("bool"), np.dtype("int32"), np.dtype("int64")
    float16, float32, float64 = np.dtype("float16"), np.dtype("float32"), np.dtype("float64")

    matmul, matrix_transpose, where = map(staticmethod, (matmul, matrix_transpose, where))
    sum, astype, concat, stack = map(staticmethod, (_sum, _astype, _concat, _stack))
    take, take_along_axis = staticmethod(_take), staticmethod(_take_along_axis)
    cumulative_sum, clip = staticmethod(_cumulative_sum), staticmethod(_clip)
    max, min = staticmethod(_extreme(np.max)), staticmethod(_extreme(np.min))
    maximum = staticmethod(_elementwise_extreme(np.maximum))
    minimum = staticmethod(_elementwise_extreme(np.minimum))

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(
            f"the gradient oracle has no {name}: add it to {__name__}, with its pullback"
        )

    def exp(self, x: Traced) -> Traced:
        return _unary(np.exp, x, lambda x, y: y)

    def expm1(self, x: Traced) -> Traced:
        return _unary(np.expm1, x, lambda x, y: y + 1)

    def log(self, x: Traced) -> Traced:
        return _unary(np.log, x, lambda x, y: 1 / x)

    def log1p(self, x: Traced) -> Traced:
        return _unary(np.log1p, x, lambda x, y: 1 / (1 + x))

    def tanh(self, x: Traced) -> Traced:
        return _unary(np.tanh, x, lambda x, y: 1 - y * y)

    def sqrt(self, x: Traced) -> Traced:
        return _unary(np.sqrt, x, lambda x, y: 1 / (2 * y))

    def square(self, x: Traced) -> Traced:
        return x * x

    def abs(self, x: Traced) -> Traced:
        return _unary(np.abs, x, lambda x, y: np.sign(x))

    def sin(self, x: Traced) -> Traced:
        return _unary(np.sin, x, lambda x, y: np.cos(x))

    def cos(self, x: Traced) -> Traced:
        return _unary(np.cos, x, lambda x, y: -np.sin(x))

    def sign(self, x: Traced) -> Traced:
        return Traced(np.sign(x.value))

    def floor(self, x: Traced) -> Traced:
        return Traced(np.floor(x.value))

    def isfinite(self, x: Traced) -> Traced:
        return Traced(np.isfinite(x.value))

    def isnan(self, x: Traced) -> Traced:
        return Traced(np.isnan(x.value))

    def any(self, x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
        return Traced(np.any(x.value, axis=axis, keepdims=keepdims))

    def all(self, x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
        return Traced(np.all(x.value, axis=axis, keepdims=keepdims))

    def add(self, a: Any, b: Any) -> Traced:
        return _lift(a, b) + b

    def multiply(self, a: Any, b: Any) -> Traced:
        return _lift(a, b) * b

    def mean(self, x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
        total = _sum(x, axis=axis, keepdims=keepdims)
        return total / (x.size / max(total.size, 1) if total.size else 1)

    def reshape(self, x: Traced, shape: tuple[int, ...], *, copy: Any = None) -> Traced:
        return Traced(x.value.reshape(shape), [(x, lambda d: d.reshape(x.shape))])

    def broadcast_to(self, x: Traced, shape: tuple[int, ...]) -> Traced:
        return Traced(np.broadcast_to(x.value, shape), [(x, lambda d: _sum_to(d, x.shape))])

    def expand_dims(self, x: Traced, *, axis: int = 0) -> Traced:
        return Traced(np.expand_dims(x.value, axis), [(x, lambda d: np.squeeze(d, axis))])

    def squeeze(self, x: Traced, axis: Any) -> Traced:
        return Traced(np.squeeze(x.value, axis), [(x, lambda d: d.reshape(x.shape))])

    def permute_dims(self, x: Traced, axes: tuple[int, ...]) -> Traced:
        return Traced(x.value.transpose(axes), [(x, lambda d: d.transpose(np.argsort(axes)))])

    def flip(self, x: Traced, *, axis: Any = None) -> Traced:
        return Traced(np.flip(x.value, axis), [(x, lambda d: np.flip(d, axis))])

    def asarray(self, x: Any, *, dtype: Any = None, device: Any = None, copy: Any = None) -> Traced:
        return (
            x if isinstance(x, Traced) and dtype is None else Traced(np.asarray(_value(x), dtype))
        )

    def arange(self, start: Any, stop: Any = None, step: Any = 1, *, dtype: Any = None,
               device: Any = None) -> Traced:  # fmt: skip
        bounds = (0, start) if stop is None else (start, stop)
        return Traced(np.arange(*bounds, step, dtype=dtype))

    def zeros(self, shape: Any, *, dtype: Any = None, device: Any = None) -> Traced:
        return Traced(np.zeros(shape, dtype))

    def ones(self, shape: Any, *, dtype: Any = None, device: Any = None) -> Traced:
        return Traced(np.ones(shape, dtype))

    def full(self, shape: Any, value: Any, *, dtype: Any = None, device: Any = None) -> Traced:
        return Traced(np.full(shape, _value(value), dtype))

    def zeros_like(self, x: Traced, *, dtype: Any = None, device: Any = None) -> Traced:
        return Traced(np.zeros(x.shape, dtype or x.dtype))

    def ones_like(self, x: Traced, *, dtype: Any = None, device: Any = None) -> Traced:
        return Traced(np.ones(x.shape, dtype or x.dtype))

    def full_like(self, x: Traced, value: Any, *, dtype: Any = None, device: Any = None) -> Traced:
        return Traced(np.full(x.shape, _value(value), dtype or x.dtype))

    def eye(self, rows: int, cols: int | None = None, *, k: int = 0, dtype: Any = None,
            device: Any = None) -> Traced:  # fmt: skip
        return Traced(np.eye(rows, cols, k, dtype))


#: The namespace of `Traced` arrays.
xp = _Namespace()
