"""The oracle's gradients: the rules added to autograd's, dtypes, ties, and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pdcore.reference import reference_attention
from pdcore_conformance.judge import autograd_namespace as xp
from pdcore_conformance.judge.autograd_namespace import Argument
from pdcore_conformance.judge.directional import gradient_derivatives, output_derivatives
from pdcore_conformance.judge.gradients import constants, gradients

Array = np.ndarray[Any, Any]
WIDE = np.longdouble
INDEX = np.asarray([[2, 0, 2], [1, 1, 0]])

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "where": lambda x: xp.where(INDEX > 0, x, x * x),
    "where, broadcast": lambda x: xp.where(INDEX > 0, x[:, :1], x[0, 0]),
    "maximum": lambda x: xp.maximum(x, x[:1] * x[:1]),
    "minimum": lambda x: xp.minimum(x, 0.3),
    "mean": lambda x: xp.mean(x * x, axis=-1, keepdims=True),
    "mean of all": lambda x: xp.mean(x * x),
    "max": lambda x: xp.max(x * x, axis=-1),
    "min of all": lambda x: xp.min(x * x),
    "sum": lambda x: xp.sum(x * x, axis=(0, 1)),
    "cumulative_sum": lambda x: xp.cumulative_sum(x * x, axis=-1),
    "cumulative_sum, first axis": lambda x: xp.cumulative_sum(x * x, axis=0),
    "broadcast_to": lambda x: xp.broadcast_to(x[:, None] ** 2, (4, 2, 3, 3)),
    "reshape": lambda x: xp.reshape(x * x, (3, 2)),
    "matrix_transpose": lambda x: xp.matrix_transpose(x * x),
    "permute_dims": lambda x: xp.permute_dims(x[None] * x, (1, 2, 0)),
    "concat": lambda x: xp.concat([x, np.ones_like(INDEX, x.dtype), x * x], axis=-1),
    "stack": lambda x: xp.stack([x, x * x], axis=-2),
    "flip": lambda x: xp.flip(x * x, axis=-1),
    "take": lambda x: xp.take(x * x, INDEX[0], axis=-1),
    "take_along_axis": lambda x: xp.take_along_axis(x * x, INDEX, axis=-1),
    "take_along_axis, broadcast": lambda x: xp.take_along_axis(x[:1] * x[:1], INDEX, axis=-1),
    "matmul": lambda x: xp.matmul(x, xp.matrix_transpose(x)),
    "abs": lambda x: xp.abs(x) * x,
    "tanh": lambda x: xp.tanh(x),
    "sqrt": lambda x: xp.sqrt(1.0 + x * x),
    "divide": lambda x: x / (1.0 + x * x),
}


def pulled(function: Callable[[Any], Any], x: Array, seed: int = 1) -> tuple[Array, Array]:
    """Return a cotangent of a function's result, and the gradient that it gives."""
    y = np.asarray(function(x))
    d = np.random.default_rng(seed).standard_normal(y.shape).astype(y.dtype)
    _, by_name = gradients(lambda a: [function(xp.astype(a["x"], x.dtype))], {"x": x}, [d])
    return d, by_name["x"]


def drawn(dtype: Any) -> Array:
    return np.random.default_rng(0).standard_normal((2, 3)).astype(dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_gradient_is_the_slope(name: str) -> None:
    function, x = FUNCTIONS[name], drawn(WIDE)
    d, gradient = pulled(function, x)
    assert gradient.dtype == WIDE
    direction = np.random.default_rng(2).standard_normal(x.shape).astype(WIDE)
    step = WIDE(1e-6)
    rise = function(x + step * direction) - function(x - step * direction)
    slope = np.sum(np.asarray(rise) * d) / (2 * step)
    np.testing.assert_allclose(float(np.sum(gradient * direction)), float(slope), rtol=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_stays_float32_on_the_way_back(name: str) -> None:
    from autograd import make_vjp

    function, x = FUNCTIONS[name], drawn(np.float32)
    vjp, y = make_vjp(function)(x)
    assert y.dtype == np.float32
    if name != "broadcast_to":  # its power is autograd's own
        assert vjp(np.ones_like(y)).dtype == np.float32


def test_the_way_back_rounds_as_the_way_there() -> None:
    x = np.asarray([1.0, 2.0], np.float32)
    d = np.asarray([1.0 + 2.0**-20, 1.0], np.float32)

    def rounded(a: Mapping[str, Any]) -> list[Any]:
        return [xp.astype(xp.astype(a["x"], ml_dtypes.bfloat16), np.float32)]

    _, by_name = gradients(rounded, {"x": x}, [d])
    np.testing.assert_array_equal(by_name["x"], np.ones(2, np.float32))


def test_entries_that_tie_share_the_cotangent() -> None:
    x, y = np.asarray([1.0, 2.0, 3.0]), np.asarray([1.0, 5.0, 0.0])

    def function(a: Mapping[str, Any]) -> list[Any]:
        one, other = (xp.astype(a[name], np.float64) for name in ("x", "y"))
        return [xp.maximum(one, other), xp.max(xp.stack([one, one]))]

    _, by_name = gradients(function, {"x": x, "y": y}, [np.ones(3), np.asarray(1.0)])
    np.testing.assert_array_equal(by_name["x"], [0.5, 0.0, 1.0 + 1.0])
    np.testing.assert_array_equal(by_name["y"], [0.5, 1.0, 0.0])


def test_what_is_not_selected_adds_no_nan() -> None:
    x = np.asarray([0.0, 4.0])

    def function(a: Mapping[str, Any]) -> list[Any]:
        z = xp.astype(a["x"], np.float64)
        return [xp.where(z > 0, xp.sqrt(xp.where(z > 0, z, 1.0)), 0.0), xp.stop_gradient(z) * z]

    _, by_name = gradients(function, {"x": x}, [np.ones(2), None])
    np.testing.assert_array_equal(by_name["x"], [0.0, 0.25])
    _, by_name = gradients(function, {"x": x}, [None, np.ones(2)])
    np.testing.assert_array_equal(by_name["x"], x)


def test_a_function_without_a_rule_is_named() -> None:
    with pytest.raises(NotImplementedError, match="nextafter"):
        gradients(
            lambda a: [xp.nextafter(xp.astype(a["x"], np.float64), 1.0)], {"x": np.ones(2)}, [None]
        )


def test_constants_leave_everything_but_arrays() -> None:
    assert constants("end") == "end"
    fixed = constants(np.arange(3))
    assert isinstance(fixed, Argument)
    np.testing.assert_array_equal(fixed[1:], [1, 2])
    np.testing.assert_array_equal(np.asarray(fixed), [0, 1, 2])


# --- derivatives along a direction ----------------------------------------------------------------

SPECS = ["softmax", "bn", "linear", "causal+bn(statistics=prefix)", "bn+sh(1,2)", "h(count)"]
#: Weights of the central difference of order 8, for steps of 1, 2, 3 and 4.
WEIGHTS = (4 / WIDE(5), -1 / WIDE(5), 4 / WIDE(105), -1 / WIDE(280))
STEP = WIDE(1e-3)


def difference(
    function: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    arrays: Mapping[str, Array],
    directions: Mapping[str, Array],
) -> dict[str, Array]:
    """Differentiate along a direction by differences: a quotient whose own error is below 1e-11."""
    total: dict[str, Any] = {}
    for count, weight in enumerate(WEIGHTS, start=1):
        for sign in (1, -1):
            moved = {n: x + sign * count * STEP * directions[n] for n, x in arrays.items()}
            for name, value in function(moved).items():
                finite = np.where(np.isfinite(value), value, 0)  # lse of an empty row stays -inf
                total[name] = total.get(name, 0) + sign * weight * finite / STEP
    return total


@pytest.mark.parametrize("spec", SPECS)
def test_derivatives_along_a_direction_are_differences(spec: str) -> None:
    rng = np.random.default_rng(3)
    # Away from 0, where the features of the linear kernel bend.
    arrays = {
        n: np.copysign(0.1 + rng.random((1, 2, rows, 3)), rng.standard_normal((1, 2, rows, 3)))
        for n, rows in (("q", 3), ("k", 9), ("v", 9))
    }
    wide = {n: x.astype(WIDE) for n, x in arrays.items()}
    toward = {n: rng.standard_normal(x.shape) for n, x in arrays.items()}
    d = rng.standard_normal((1, 2, 3, 3)), rng.standard_normal((1, 2, 3))

    def outputs(x: Mapping[str, Any]) -> dict[str, Any]:
        return dict(
            zip(("out", "lse"), reference_attention(**x, spec=spec, return_lse=True), strict=True)
        )

    def gradient(x: Mapping[str, Array]) -> dict[str, Array]:
        return gradients(lambda a: list(outputs(a).values()), x, d)[1]

    results = {
        outputs: output_derivatives(**arrays, spec=spec, directions=toward),
        gradient: gradient_derivatives(
            **arrays, spec=spec, directions=toward, d_out=d[0], d_lse=d[1]
        ),
    }
    for function, result in results.items():
        expected = difference(function, wide, toward)
        assert result.keys() == expected.keys()
        for name, x in result.items():
            assert x.dtype == WIDE
            scale = float(np.max(np.abs(expected[name])))
            np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-11 * scale + 1e-15)
