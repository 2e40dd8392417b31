"""Kernels written as one function: `score_kernel`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import SpecError, UnsupportedError
from .expression import PLACES, Expression
from .kernel_base import Parameter, PointwiseKernel
from .vocabulary import register_kernel

__all__ = ["FunctionKernel", "score_kernel"]


class FunctionKernel(PointwiseKernel):
    """The base class of the kernels that `score_kernel` makes."""

    of_function = True  # may be registered anew, see `.vocabulary`

    def latex(self) -> str:
        """Return the name of the function with what it depends on, in an exponential."""
        symbols = {"distance": "j - p", "query_label": "l_i", "key_label": "l_j"}
        inputs = ", ".join([r"x^\top y", *(symbols[name] for name in self.places)])
        name = self.word.replace("_", r"\_")
        return rf"\exp(\mathrm{{{name}}}({inputs}))"


def score_kernel(
    function: Callable[..., Any] | None = None, /, **tables: int | tuple[int, int]
) -> Any:
    """Make a kernel of a function that returns log kappa of s = x.y; a decorator.

    The kernel runs on every backend that has kernels of users, with its gradient. Its word in a
    spec is the name of the function. Decorating a function of that name again, as in a notebook,
    replaces the kernel.

    Parameters
    ----------
    function : callable
        Called once, with a symbol for s and, by keyword, for each of its keyword-only arguments:
        ``distance``, the position of the key less that of the query; ``query_label`` and
        ``key_label``, from the `labels` of the call; ``dim``, the number of features D; any other
        name is a parameter, in the `params` of a call, with one number for each query head, which
        may have a default. It may use ``+ - * / **``, ``abs``, comparisons, and `exp`, `log`,
        `tanh`, `maximum` and `where` of `pdcore.extend`.
    **tables : int or (int, int)
        Parameters that are tables, by name, with their sizes: ``t[index]`` is an entry, of a
        function of ``distance`` or of a label, and ``t[query_label, key_label]`` one of a table
        with two axes. Indices beyond the ends are those of the ends. Entries are 0 by default.

    Returns
    -------
    type
        A subclass of `PointwiseKernel`, for `AttentionSpec`.

    Raises
    ------
    UnsupportedError
        For a function that cannot be traced.
    PluginError
        For a name that is the word of something else.

    Examples
    --------
    >>> import numpy as np
    >>> @score_kernel(near=7)
    ... def local(s, *, dim, distance, near, slope=0.1):
    ...     return s / dim**0.5 - slope * abs(distance) + near[distance + 3]
    >>> x = np.ones((1, 2, 5, 4))
    >>> from pdcore import attention
    >>> attention(x, x, x, "local+causal", params={"slope": np.array([0.5, 1.0])}).shape
    (1, 2, 5, 4)
    """
    if function is None:
        return lambda function: score_kernel(function, **tables)
    name = str(getattr(function, "__name__", function))
    parameters = _parameters(name, function, tables)
    named = tuple(inspect.signature(function).parameters)[1:]

    def log_kappa(self: Any, s: Expression, dim: int, **values: Any) -> Any:
        known = {**values, "dim": dim}
        return function(s, **{n: known[n] for n in named})

    members = {
        "__doc__": function.__doc__ or f"The kernel of the function {name}.",
        "__module__": function.__module__,
        "__qualname__": getattr(function, "__qualname__", name),
        "word": name,
        "places": tuple(place for place in PLACES if place in named),
        "log_kappa": log_kappa,
        "parameters": lambda self: parameters,
    }
    kernel: Any = dataclass(frozen=True)(type(name, (FunctionKernel,), members))
    kernel().expression(8)  # a function that cannot be traced is refused here
    return register_kernel(kernel)


def _parameters(
    name: str, function: Callable[..., Any], tables: dict[str, Any]
) -> tuple[Parameter, ...]:
    """Return the parameters that the signature of a function and its tables declare."""
    first, *others = inspect.signature(function).parameters.values()
    wrong = [p.name for p in others if p.kind is not p.KEYWORD_ONLY]
    if wrong or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise UnsupportedError(
            f"{name}: got the arguments {inspect.signature(function)}, expected one by position, "
            "the product of query and key, and the others by keyword: f(s, *, distance, slope)"
        )
    known = {p.name: p for p in others if p.name not in (*PLACES, "dim")}
    for table, sizes in tables.items():
        if table not in known:
            raise SpecError(f"{name}: table {table!r} is no argument of the function; add it")
        whole = sizes if isinstance(sizes, tuple) else (sizes,)
        if len(whole) not in (1, 2) or not all(type(n) is int and n > 0 for n in whole):
            raise SpecError(
                f"{name}: table {table!r}: got {sizes!r}, expected a size, or two: {table}=8"
            )
    declared = []
    for p in known.values():
        sizes = tables.get(p.name, ())
        default = 0.0 if p.name in tables else None
        if p.default is not p.empty:
            number = isinstance(p.default, int | float) and not isinstance(p.default, bool)
            if p.name in tables or not number:
                raise SpecError(
                    f"{name}: the default of {p.name} is {p.default!r}, expected a number, or "
                    "none for a table"
                )
            default = float(p.default)
        shape = ("Hq", *(sizes if isinstance(sizes, tuple) else (sizes,)))
        declared.append(Parameter(p.name, (shape,), default=default))
    return tuple(declared)
