"""Traced scalar functions: what they evaluate to, their derivatives, and their CUDA text."""

from __future__ import annotations

import ast
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nightly import examples

from pdcore.errors import UnsupportedError
from pdcore.spec import Expression, exp, log, maximum, tanh, trace, where

# --- random expressions, each with the Python function that it was traced from --------------------

Function = Callable[..., Any]


class Floats:
    """The operations on floats, beside those of `pdcore.spec.expression` on traced values."""

    exp, log, tanh, maximum = math.exp, math.log, math.tanh, staticmethod(max)

    @staticmethod
    def where(condition: bool, x: float, y: float) -> float:
        return x if condition else y


class Traced:
    exp, log, tanh, maximum, where = map(staticmethod, (exp, log, tanh, maximum, where))


CONSTANTS = st.sampled_from([-2.0, -0.5, 0.25, 1.0, 3.0])


def combined(inner: st.SearchStrategy[Function]) -> st.SearchStrategy[Function]:
    def binary(name: str, f: Function, g: Function) -> Function:
        return {
            "+": lambda m, s, t: f(m, s, t) + g(m, s, t),
            "-": lambda m, s, t: f(m, s, t) - g(m, s, t),
            "*": lambda m, s, t: f(m, s, t) * g(m, s, t),
            "/": lambda m, s, t: f(m, s, t) / (2.0 + g(m, s, t) * g(m, s, t)),
            "max": lambda m, s, t: m.maximum(f(m, s, t), g(m, s, t)),
            "where": lambda m, s, t: m.where(f(m, s, t) > g(m, s, t), s, g(m, s, t)),
            "where <=": lambda m, s, t: m.where(f(m, s, t) <= 0.5, g(m, s, t), t),
            "**": lambda m, s, t: (1.0 + abs(f(m, s, t))) ** m.tanh(g(m, s, t)),
        }[name]

    def unary(name: str, f: Function) -> Function:
        return {
            "tanh": lambda m, s, t: m.tanh(f(m, s, t)),
            "exp": lambda m, s, t: m.exp(m.tanh(f(m, s, t))),
            "log": lambda m, s, t: m.log(1.0 + abs(f(m, s, t))),
            "abs": lambda m, s, t: abs(f(m, s, t)),
            "neg": lambda m, s, t: -f(m, s, t),
            "square": lambda m, s, t: f(m, s, t) ** 2,
            "cube": lambda m, s, t: f(m, s, t) ** 3,
            "root": lambda m, s, t: (1.0 + f(m, s, t) ** 2) ** 0.5,
            "reverse -": lambda m, s, t: 1.5 - f(m, s, t),
            "reverse /": lambda m, s, t: 2.0 / (1.0 + abs(f(m, s, t))),
            "reverse **": lambda m, s, t: 2.0 ** m.tanh(f(m, s, t)),
        }[name]

    binaries = ["+", "-", "*", "/", "max", "where", "where <=", "**"]
    unaries = [
        "tanh",
        "exp",
        "log",
        "abs",
        "neg",
        "square",
        "cube",
        "root",
        "reverse -",
        "reverse /",
        "reverse **",
    ]
    return st.builds(binary, st.sampled_from(binaries), inner, inner) | st.builds(
        unary, st.sampled_from(unaries), inner
    )


LEAVES: st.SearchStrategy[Function] = st.one_of(
    st.just(lambda m, s, t: s),
    st.just(lambda m, s, t: t),
    CONSTANTS.map(lambda c: lambda m, s, t: c + 0.0 * s),
    CONSTANTS.map(lambda c: lambda m, s, t: c * s),
)
FUNCTIONS = st.recursive(LEAVES, combined, max_leaves=6)
POINTS = st.floats(-2.0, 2.0)
#: Points that no comparison of small expressions has as its only exception.
GENERIC = [st.integers(-200, 200).map(lambda i, o=o: i / 100 + o) for o in (0.001371, 0.002713)]


def traced(f: Function) -> Expression:
    return trace(lambda s, t: f(Traced, s, t), ("s", "t"))


def value(f: Function, s: float, t: float) -> float:
    try:
        result = float(f(Floats, s, t))
    except OverflowError:
        assume(False)
    assume(abs(result) < 1e6)
    return result


@examples(300)
@given(FUNCTIONS, POINTS, POINTS)
def test_an_expression_evaluates_as_its_function(f: Function, s: float, t: float) -> None:
    want = value(f, s, t)
    for xp in (np, array_api_strict):
        values = {n: xp.asarray([x], dtype=xp.float64) for n, x in (("s", s), ("t", t))}
        got = traced(f)(values, xp)
        assert float(got if isinstance(got, float) else got[0]) == pytest.approx(
            want, rel=1e-12, abs=1e-12
        )


@examples(300)
@given(FUNCTIONS, *GENERIC)
def test_the_derivative_is_the_central_difference(f: Function, s: float, t: float) -> None:
    e, h = traced(f), 1e-4
    values = {"s": np.asarray(s), "t": np.asarray(t)}
    for name in ("s", "t"):

        def moved(step: float, name: str = name) -> float:
            return value(f, s + step, t) if name == "s" else value(f, s, t + step)

        slopes = [(moved(a + h) - moved(a - h)) / (2 * h) for a in (-2 * h, 0.0, 2 * h)]
        got = float(e.derivative(name)(values, np))
        scale = 1.0 + max(map(abs, slopes))
        # Between three slopes that disagree there is a kink; elsewhere they differ by O(h).
        assume(max(slopes) - min(slopes) < 1e-2 * scale)
        curvature = abs(slopes[0] - 2 * slopes[1] + slopes[2])
        assert abs(got - slopes[1]) <= 1e-6 * scale + curvature


@examples(200)
@given(FUNCTIONS, POINTS, POINTS)
def test_cuda_text_says_the_same(f: Function, s: float, t: float) -> None:
    want = value(f, s, t)
    for dtype, names in (("double", CUDA), ("float", {f"{n}f": g for n, g in CUDA.items()})):
        text = traced(f).cuda(dtype)
        got = evaluate_c(text, {"s": s, "t": t}, names)
        assert got == pytest.approx(want, rel=1e-9, abs=1e-9)


def safe_pow(x: float, y: float) -> float:
    return math.pow(x, y)


CUDA: dict[str, Callable[..., float]] = {
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "fabs": abs,
    "fmax": max,
    "pow": safe_pow,
}


def evaluate_c(text: str, values: dict[str, float], functions: dict[str, Any]) -> float:
    """Evaluate C text that consists of numbers, names, calls, + - * / < > and ?: in brackets."""
    suffix = "f" if any(name.endswith("f") and name != "fabs" for name in functions) else ""
    if suffix:
        assert not re.search(r"\d\.\d*(e[+-]?\d+)?(?![\df.e])", text), f"a double in {text}"
    python = re.sub(r"(\d\.?\d*(?:e[+-]?\d+)?)f\b", r"\1", text)
    while "?" in python:  # innermost choices first: they have brackets of their own
        python = innermost_choice(python)
    tree = ast.parse(python, mode="eval")
    allowed = (
        ast.Expression,
        ast.BinOp,
        ast.UnaryOp,
        ast.Compare,
        ast.IfExp,
        ast.Call,
        ast.Name,
        ast.Constant,
        ast.operator,
        ast.unaryop,
        ast.cmpop,
        ast.Load,
    )
    assert all(isinstance(node, allowed) for node in ast.walk(tree)), python
    scope = {"__builtins__": {}, **values, **functions}
    return float(eval(compile(tree, "cuda", "eval"), scope))  # noqa: S307


def innermost_choice(text: str) -> str:
    """Rewrite one ``(a ? b : c)`` without choices inside as Python."""
    mark = text.rindex("?")
    depth, start = 0, mark
    while depth <= 0:
        start -= 1
        depth += {"(": 1, ")": -1}.get(text[start], 0)
    depth, colon, end = 0, 0, mark
    while depth <= 0:
        end += 1
        depth += {")": 1, "(": -1}.get(text[end], 0)
        if text[end] == ":" and depth == 0:
            colon = end
    condition, x, y = (
        part.strip()
        for part in (text[start + 1 : mark], text[mark + 1 : colon], text[colon + 1 : end])
    )
    return f"{text[:start]}(({x}) if ({condition}) else ({y})){text[end + 1 :]}"


@examples(100)
@given(FUNCTIONS)
def test_expressions_are_values(f: Function) -> None:
    e, again = traced(f), traced(f)
    assert e == again
    assert hash(e) == hash(again)
    assert pickle.loads(pickle.dumps(e)) == e  # noqa: S301
    assert e.inputs <= {"s", "t"}
    for name in ("s", "t"):
        assert e.derivative(name).inputs <= e.inputs
        if name not in e.inputs:
            assert e.derivative(name) == Expression("const", (), 0.0)
    with pytest.raises(AttributeError):
        e.op = "other"  # type: ignore[misc]


# --- by hand --------------------------------------------------------------------------------------


def one(function: Callable[[Expression], Any]) -> Expression:
    return trace(function, ("s",))


S = Expression("input", (), "s")


@pytest.mark.parametrize(
    ("function", "text", "slope"),
    [
        (lambda s: 2.0 * s + 1.0, "((2.0 * s) + 1.0)", "2.0"),
        (lambda s: s - 0.0, "s", "1.0"),
        (lambda s: 1 * s / 1, "s", "1.0"),
        (lambda s: 0 * s, "0.0", "0.0"),
        (lambda s: s**2, "(s pow 2.0)", None),
        (lambda s: 3.0, "3.0", "0.0"),
        (lambda s: exp(0.0) + log(1.0) + tanh(0.0) + s, "(1.0 + s)", "1.0"),
        (lambda s: abs(s), "abs(s)", "where((s > 0.0), 1.0, where((s < 0.0), -1.0, 0.0))"),
        (
            lambda s: where(s >= 1, s, 2.0),
            "where((s >= 1.0), s, 2.0)",
            "where((s >= 1.0), 1.0, 0.0)",
        ),
        (lambda s: maximum(s, 0), "maximum(s, 0.0)", None),
        (lambda s: -s, "(-1.0 * s)", "-1.0"),
    ],
)
def test_traces_by_hand(function: Any, text: str, slope: str | None) -> None:
    e = one(function)
    if "pow" not in text:
        assert str(e) == text
    if slope is not None:
        assert str(e.derivative("s")) == slope


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda s: s + 1.0, "(s + 1.0f)"),
        (lambda s: s**2, "(s * s)"),
        (lambda s: s**3, "powf(s, 3.0f)"),
        (lambda s: exp(-s), "expf(((-1.0f) * s))"),
        (lambda s: where(s < 0.5, s, 0.25), "((s < 0.5f) ? s : 0.25f)"),
        (lambda s: maximum(s, -1e-30), "fmaxf(s, (-1e-30f))"),
        (lambda s: log(abs(s)), "logf(fabsf(s))"),
        (lambda s: where(s > 0, s, -math.inf), "((s > 0.0f) ? s : (-__int_as_float(0x7f800000)))"),
    ],
)
def test_cuda_by_hand(function: Any, text: str) -> None:
    assert one(function).cuda() == text


def test_cuda_in_double() -> None:
    assert one(lambda s: tanh(s) / 3.0).cuda("double") == "(tanh(s) / 3.0)"
    infinite = one(lambda s: maximum(s, math.inf)).cuda("double")
    assert infinite == "fmax(s, __longlong_as_double(0x7ff0000000000000LL))"
    with pytest.raises(ValueError, match="dtype: got 'half', expected 'float' or 'double'"):
        S.cuda("half")


def test_derivatives_at_ties_and_zeros() -> None:
    zero = {"s": np.asarray(0.0)}
    assert float(one(abs).derivative("s")(zero, np)) == 0.0
    assert float(one(lambda s: maximum(s, 0.0)).derivative("s")(zero, np)) == 0.5
    assert float(one(lambda s: s**2).derivative("s")(zero, np)) == 0.0
    assert float(one(lambda s: s**1).derivative("s")(zero, np)) == 1.0


def test_shared_parts_are_evaluated_once() -> None:
    calls = []

    class Counting:
        full_like = staticmethod(np.full_like)

        @staticmethod
        def tanh(x: Any) -> Any:
            calls.append(1)
            return np.tanh(x)

    def squared_twice(s: Expression) -> Expression:
        t = tanh(s)
        for _ in range(30):  # 2^30 nodes as a tree, 31 as what it is
            t = t * t
        return t

    e = one(squared_twice)
    assert float(e({"s": np.asarray(1.0)}, Counting)) == pytest.approx(math.tanh(1.0) ** 2**30)
    assert len(calls) == 1


# --- what cannot be traced ------------------------------------------------------------------------

UNTRACEABLE: dict[str, Callable[[Expression], Any]] = {
    "numpy": lambda s: np.tanh(s),
    "numpy operand": lambda s: np.ones(3) * s,
    "math": lambda s: math.exp(s),
    "if": lambda s: s if s > 0 else -s,
    "and": lambda s: where((s > 0) and (s < 1), s, 0.0),
    "method": lambda s: s.clip(0.0),
    "index": lambda s: s[0],
    "modulo": lambda s: s % 2,
    "string": lambda s: s + "1",
    "bool": lambda s: s + True,
    "complex": lambda s: s * 1j,
    "float": lambda s: float(s),
    "built-in max": lambda s: max(s, 0.0),
    "condition": lambda s: where(s, 1.0, 0.0),
    "log of a constant": lambda s: s + log(-1.0),
    "division of constants": lambda s: s + exp(0.0) / (log(1.0)),
    "nothing": lambda s: None,
    "array": lambda s: np.ones(2),
    "pair": lambda s: (s, s),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_errors_of_tracing_list_the_allowed_operations(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        one(UNTRACEABLE[name])
    assert "cannot be traced" in str(caught.value)
    assert "expected an expression" in str(caught.value) or "tanh" in str(caught.value)
