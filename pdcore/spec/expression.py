"""Pointwise functions of a few scalars, traced into expressions.

A pointwise kernel defines log kappa as a Python function of s = x.y. Calling the function once on
a symbol returns an `Expression`: evaluation in any array library, derivative, and CUDA text.

>>> from pdcore.spec.expression import trace, tanh
>>> bounded = trace(lambda s: tanh(s) + 2.0, ("s",))
>>> print(bounded)
(tanh(s) + 2.0)
>>> print(bounded.derivative("s").cuda())
(1.0f - (tanhf(s) * tanhf(s)))
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from .expression_arrays import apply_operation
from .expression_cuda import INFIX, cuda_source

__all__ = [
    "DISTANCE",
    "KEY_LABEL",
    "PLACES",
    "QUERY_LABEL",
    "Expression",
    "exp",
    "log",
    "maximum",
    "tanh",
    "trace",
    "where",
]

#: The inputs of an expression that belong to a pair of a query and a key: the position of the key
#: less that of the query, and their labels.
DISTANCE, QUERY_LABEL, KEY_LABEL = PLACES = ("distance", "query_label", "key_label")

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_COMPARISONS = frozenset(_COMPARE)


@dataclass(frozen=True, slots=True, repr=False)
class Expression:
    """A node of a traced scalar function: immutable, hashable and picklable.

    Attributes
    ----------
    op : str
        ``"input"``, ``"const"``, or the name of an operation.
    args : tuple of Expression
        The operands.
    value : float or str or None
        The constant, or the input's name.
    """

    op: str
    args: tuple[Expression, ...] = ()
    value: float | str | None = None

    # Makes `np.tanh(s)` raise a TypeError, where NumPy would return an object array.
    __array_ufunc__ = None

    def __add__(self, other: Expression | float) -> Expression:
        return _binary("add", self, other)

    def __radd__(self, other: Expression | float) -> Expression:
        return _binary("add", other, self)

    def __sub__(self, other: Expression | float) -> Expression:
        return _binary("sub", self, other)

    def __rsub__(self, other: Expression | float) -> Expression:
        return _binary("sub", other, self)

    def __mul__(self, other: Expression | float) -> Expression:
        return _binary("mul", self, other)

    def __rmul__(self, other: Expression | float) -> Expression:
        return _binary("mul", other, self)

    def __truediv__(self, other: Expression | float) -> Expression:
        return _binary("div", self, other)

    def __rtruediv__(self, other: Expression | float) -> Expression:
        return _binary("div", other, self)

    def __pow__(self, other: Expression | float) -> Expression:
        return _binary("pow", self, other)

    def __rpow__(self, other: Expression | float) -> Expression:
        return _binary("pow", other, self)

    def __neg__(self) -> Expression:
        return _binary("mul", -1.0, self)

    def __abs__(self) -> Expression:
        return _unary("abs", self)

    def __lt__(self, other: Expression | float) -> Expression:
        return _binary("lt", self, other)

    def __le__(self, other: Expression | float) -> Expression:
        return _binary("le", self, other)

    def __gt__(self, other: Expression | float) -> Expression:
        return _binary("gt", self, other)

    def __ge__(self, other: Expression | float) -> Expression:
        return _binary("ge", self, other)

    def __getitem__(self, index: Any) -> Expression:
        """Return an entry of a table: a parameter with one axis or two after that of heads.

        The index is a function of ``distance``, of ``query_label`` or of ``key_label``; of a table
        with two axes, of ``query_label`` and of ``key_label``. It is rounded down, and beyond the
        ends of the table it is that of the end.
        """
        if self.op != "input":
            raise TypeError(f"{self} is no parameter, and only a parameter has entries")
        places = tuple(map(_as_expression, index if isinstance(index, tuple) else (index,)))
        reads = [tuple(place.inputs) for place in places]
        if reads not in ([(QUERY_LABEL,), (KEY_LABEL,)], *([(name,)] for name in PLACES)):
            raise TypeError(
                f"{self}[{', '.join(map(str, places))}]: the index of a table is a function of one "
                "of distance, query_label and key_label; that of a table with two axes is one of "
                "query_label, and one of key_label"
            )
        return Expression("entry", (self, *places))

    __iter__ = None  # the entries of a table are read one by one

    def __bool__(self) -> bool:
        raise TypeError(
            "the truth of a traced value is not known: use pdcore.spec.expression.where"
        )

    def __float__(self) -> float:
        raise TypeError(
            "a traced value has no number yet: use the functions of pdcore.spec.expression"
        )

    def __str__(self) -> str:
        if self.op in ("input", "const"):
            return str(self.value)
        if self.op in INFIX:
            return f"({self.args[0]} {INFIX[self.op]} {self.args[1]})"
        if self.op == "entry":
            return f"{self.args[0]}[{', '.join(map(str, self.args[1:]))}]"
        return f"{self.op}({', '.join(map(str, self.args))})"

    def __repr__(self) -> str:
        return f"Expression({self})"

    @property
    def inputs(self) -> frozenset[str]:
        """The names of the inputs that the expression depends on."""
        if self.op == "input":
            return frozenset((str(self.value),))
        return frozenset().union(*(a.inputs for a in self.args))

    @property
    def table(self) -> str:
        """The name of the table that an entry is read from."""
        return str(self.args[0].value)

    @property
    def entries(self) -> tuple[Expression, ...]:
        """The entries of tables that the expression reads, each once."""
        if self.op == "entry":
            return (self,)
        return tuple(dict.fromkeys(entry for a in self.args for entry in a.entries))

    def __call__(self, values: Mapping[Any, Any], xp: Any) -> Any:
        """Evaluate the expression on arrays.

        Parameters
        ----------
        values : mapping of str or Expression to array
            One array for each input, and for each of `entries`; they broadcast together.
        xp : namespace
            An array-API namespace.

        Returns
        -------
        array or float
            A Python float where the expression is constant.
        """
        return _evaluate(self, values, xp, {})

    def derivative(self, of: str | Expression) -> Expression:
        """Return the derivative with respect to an input, by its name, or to one of `entries`."""
        return _derive(self, Expression("input", (), of) if isinstance(of, str) else of, {})

    def cuda(self, dtype: str = "float") -> str:
        """Return the expression as CUDA C++.

        Parameters
        ----------
        dtype : {"float", "double"}
            The type that the inputs have in the kernel.

        Returns
        -------
        str
            An expression in the input names.
        """
        if dtype not in ("float", "double"):
            raise ValueError(f"dtype: got {dtype!r}, expected 'float' or 'double'")
        return cuda_source(self, "f" if dtype == "float" else "")


def trace(
    function: Callable[..., Any], names: tuple[str, ...], title: str | None = None
) -> Expression:
    """Trace a Python function of scalars into an `Expression`.

    Parameters
    ----------
    function : callable
        Called once, with one symbol for each name, by position. It may use ``+ - * / **``,
        ``abs``, comparisons, and `exp`, `log`, `tanh`, `maximum` and `where` of this module.
    names : tuple of str
        The inputs' names.
    title : str, optional
        The name of the function in error messages; its ``__qualname__`` by default.

    Raises
    ------
    UnsupportedError
        When the function uses anything else.
    """
    symbols = tuple(Expression("input", (), name) for name in names)
    title = title or str(getattr(function, "__qualname__", function))
    try:
        result = function(*symbols)
    except (TypeError, AttributeError) as error:
        raise UnsupportedError(
            f"{title} cannot be traced ({error}): a "
            "pointwise kernel may use + - * / **, abs, comparisons, entries of tables, and exp, "
            "log, tanh, maximum, where of pdcore.extend; write anything else as a FeatureMap"
        ) from error
    if not isinstance(result, (Expression, int, float)):
        raise UnsupportedError(
            f"{title} cannot be traced: it returned "
            f"{type(result).__name__}, expected an expression of its arguments"
        )
    return _as_expression(result)


def exp(x: Expression | float) -> Expression:
    """Trace the exponential."""
    return _unary("exp", x)


def log(x: Expression | float) -> Expression:
    """Trace the natural logarithm."""
    return _unary("log", x)


def tanh(x: Expression | float) -> Expression:
    """Trace the hyperbolic tangent."""
    return _unary("tanh", x)


def maximum(x: Expression | float, y: Expression | float) -> Expression:
    """Trace the larger of two values; at a tie the derivative is the mean of both."""
    return _binary("maximum", x, y)


def where(condition: Any, x: Expression | float, y: Expression | float) -> Expression:
    """Trace a choice between two values by a comparison."""
    if not isinstance(condition, Expression) or condition.op not in _COMPARISONS:
        raise TypeError(f"condition: got {condition!r}, expected a comparison such as s > 0")
    left, right = condition.args
    if left.op == right.op == "const":  # array-API `where` takes no Python bool
        return _as_expression(x if _COMPARE[condition.op](left.value, right.value) else y)
    return Expression("where", (condition, _as_expression(x), _as_expression(y)))


def _as_expression(x: Expression | float) -> Expression:
    if isinstance(x, Expression):
        return x
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{type(x).__name__} is not a number or a traced value")
    return Expression("const", (), float(x))


_FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "maximum": max,
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "abs": abs,
}


def _unary(op: str, x: Expression | float) -> Expression:
    a = _as_expression(x)
    if a.op == "const":
        return Expression("const", (), _fold(op, a.value))
    return Expression(op, (a,))


def _fold(op: str, *values: Any) -> float:
    try:
        result = _FOLD[op](*values)
    except (ArithmeticError, ValueError) as error:
        raise TypeError(f"{op} of the constants {values} is not defined") from error
    if isinstance(result, complex):
        raise TypeError(f"{op} of the constants {values} is not a real number")
    return float(result)


def _binary(op: str, x: Expression | float, y: Expression | float) -> Expression:
    a, b = _as_expression(x), _as_expression(y)
    if a.op == "const" and b.op == "const" and op not in _COMPARISONS:
        return Expression("const", (), _fold(op, a.value, b.value))
    zero, one = Expression("const", (), 0.0), Expression("const", (), 1.0)
    # Keeps derivatives short, by identities that hold for every finite value.
    if (op == "add" and a == zero) or (op == "mul" and a == one):
        return b
    if (op in ("add", "sub") and b == zero) or (op in ("mul", "div", "pow") and b == one):
        return a
    if (op == "mul" and zero in (a, b)) or (op == "div" and a == zero):
        return zero
    return Expression(op, (a, b))


def _evaluate(e: Expression, values: Mapping[Any, Any], xp: Any, seen: dict[int, Any]) -> Any:
    if e.op == "const":
        return e.value
    if e.op == "input":
        return values[str(e.value)]
    if e.op == "entry":
        return values[e]
    key = id(e)
    if key not in seen:
        args = [_evaluate(a, values, xp, seen) for a in e.args]
        seen[key] = apply_operation(e.op, args, next(iter(values.values())), xp)
    return seen[key]


def _derive(e: Expression, of: Expression, seen: dict[int, Expression]) -> Expression:
    if e.op in ("const", "input", "entry"):
        return _as_expression(1.0 if e == of else 0.0)
    key = id(e)
    if key not in seen:
        seen[key] = _differentiate(e, [_derive(a, of, seen) for a in e.args])
    return seen[key]


def _differentiate(e: Expression, d: list[Expression]) -> Expression:
    """Apply the chain rule to one operation; `d` has the derivatives of its operands."""
    zero = _as_expression(0.0)
    if all(x == zero for x in d) or e.op in _COMPARISONS:
        return zero
    a = e.args[0]
    if e.op == "where":
        return where(a, d[1], d[2])
    if len(e.args) == 1:
        match e.op:
            case "exp":
                return e * d[0]
            case "log":
                return d[0] / a
            case "tanh":
                return (1.0 - e * e) * d[0]
            case "abs":
                return where(a > 0, d[0], where(a < 0, -d[0], zero))
    b = e.args[1]
    match e.op:
        case "add":
            return d[0] + d[1]
        case "sub":
            return d[0] - d[1]
        case "mul":
            return d[0] * b + a * d[1]
        case "div":
            return d[0] / b - a * d[1] / (b * b)
        case "pow":
            if d[1] == zero:
                return b * a ** (b - 1.0) * d[0]
            return e * (d[1] * log(a) + b * d[0] / a)
        case "maximum":
            return where(a > b, d[0], where(a < b, d[1], 0.5 * (d[0] + d[1])))
    raise AssertionError(f"no derivative rule for {e.op}")
