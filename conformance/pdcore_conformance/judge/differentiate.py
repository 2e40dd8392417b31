"""Gradients of the reference, in NumPy alone: the oracle of the gradient cases.

A small reverse mode over the array API. It is our own, where a library would do for the rest of
the suite, because the oracle of a float64 case is ``numpy.longdouble``, which no framework has,
because the reference asks its arrays for an array-API namespace, which HIPS autograd's do not
have, and because an environment with NumPy only has to be able to judge gradients.

A `Traced` array remembers what it was computed from; `gradients` walks back. Integers and
booleans carry no gradient. A function that is not here raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "Traced",
    "binary",
    "constants",
    "gradients",
    "lifted",
    "multiply",
    "sum_to",
    "unary",
    "value_of",
]

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
        return bool(self.parents) or isinstance(self, _Leaf)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        from . import traced_namespace

        return traced_namespace

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
        return Traced(self.value.swapaxes(-1, -2), [(self, lambda d: d.swapaxes(-1, -2))])

    @property
    def mT(self) -> Traced:  # noqa: N802 - the array API's name
        """The transpose of the last two axes."""
        return Traced(self.value.swapaxes(-1, -2), [(self, lambda d: d.swapaxes(-1, -2))])

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
        return unary(np.abs, self, lambda x, y: np.sign(x))

    def __invert__(self) -> Traced:
        return Traced(~self.value)

    def __add__(self, other: Any) -> Traced:
        return binary(np.add, self, other, lambda d, a, b: d, lambda d, a, b: d)

    def __sub__(self, other: Any) -> Traced:
        return binary(np.subtract, self, other, lambda d, a, b: d, lambda d, a, b: -d)

    def __mul__(self, other: Any) -> Traced:
        return binary(np.multiply, self, other, lambda d, a, b: d * b, lambda d, a, b: d * a)

    def __truediv__(self, other: Any) -> Traced:
        return binary(
            np.true_divide, self, other, lambda d, a, b: d / b, lambda d, a, b: -d * a / (b * b)
        )

    def __pow__(self, other: Any) -> Traced:
        def base(d: Array, a: Array, b: Array) -> Array:
            return np.asarray(d * b * a ** (b - 1))

        def exponent(d: Array, a: Array, b: Array) -> Array:
            return np.asarray(d * a**b * np.log(np.where(a > 0, a, 1)))

        return binary(np.power, self, other, base, exponent)

    def __matmul__(self, other: Any) -> Traced:
        return multiply(self, other)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> Traced:
        return lifted(other, self) - self

    def __rtruediv__(self, other: Any) -> Traced:
        return lifted(other, self) / self

    def __rpow__(self, other: Any) -> Traced:
        return lifted(other, self) ** self

    def __rmatmul__(self, other: Any) -> Traced:
        return multiply(lifted(other, self), self)

    def __lt__(self, other: Any) -> Traced:
        return Traced(self.value < value_of(other))

    def __le__(self, other: Any) -> Traced:
        return Traced(self.value <= value_of(other))

    def __gt__(self, other: Any) -> Traced:
        return Traced(self.value > value_of(other))

    def __ge__(self, other: Any) -> Traced:
        return Traced(self.value >= value_of(other))

    def __eq__(self, other: object) -> Any:
        return Traced(self.value == value_of(other))

    def __ne__(self, other: object) -> Any:
        return Traced(self.value != value_of(other))

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Any) -> Traced:
        return Traced(self.value & value_of(other))

    def __or__(self, other: Any) -> Traced:
        return Traced(self.value | value_of(other))

    __rand__ = __and__
    __ror__ = __or__

    def __floordiv__(self, other: Any) -> Traced:
        return Traced(self.value // value_of(other))

    def __mod__(self, other: Any) -> Traced:
        return Traced(self.value % value_of(other))


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


def value_of(x: Any) -> Any:
    """Give the NumPy array of a traced one, and anything else as it is."""
    return x.value if isinstance(x, Traced) else x


def lifted(x: Any, like: Traced) -> Traced:
    """Make a number an array of the dtype of another."""
    return x if isinstance(x, Traced) else Traced(np.asarray(x, like.dtype))


def sum_to(d: Array, shape: tuple[int, ...]) -> Array:
    """Sum what was broadcast."""
    if d.shape == shape:
        return d
    d = np.asarray(d.sum(axis=tuple(range(d.ndim - len(shape)))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and d.shape[i] != 1)
    return np.asarray(d.sum(axis=axes, keepdims=True)) if axes else d


def binary(operation: Any, a: Any, b: Any, pull_a: Any, pull_b: Any) -> Traced:
    """Apply an operation of two arrays; the pullbacks take the cotangent and both."""
    x, y = value_of(a), value_of(b)
    parents: list[tuple[Traced, Pull]] = []
    if isinstance(a, Traced):
        parents.append((a, lambda d: sum_to(pull_a(d, x, y), a.shape)))
    if isinstance(b, Traced):
        parents.append((b, lambda d: sum_to(pull_b(d, x, y), b.shape)))
    return Traced(operation(x, y), parents)


def unary(operation: Any, x: Any, slope: Callable[[Array, Array], Array]) -> Traced:
    """Apply an operation of one array, whose slope is a function of it and of the result."""
    y = operation(x.value)
    return Traced(y, [(x, lambda d: d * slope(x.value, y))])


def multiply(a: Any, b: Any) -> Traced:
    """Multiply matrices."""

    def left(d: Array, x: Array, y: Array) -> Array:
        return np.asarray(np.matmul(d, y.swapaxes(-1, -2)))

    def right(d: Array, x: Array, y: Array) -> Array:
        return np.asarray(np.matmul(x.swapaxes(-1, -2), d))

    return binary(np.matmul, a, b, left, right)
