"""Calls with NumPy arrays, and comparisons of their results with the oracle, for many tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pdcore.backend import FEATURES, ArrayBackend, Backend, BackendInfo, Inputs
from pdcore.lowering import Plan, Signature, lower
from pdcore.reference import reference_attention, reference_weights
from pdcore.spec import (
    AttentionSpec,
    Polynomial,
    Relu,
    as_spec,
)
from pdcore_conformance.judge.budget import EPS, FACTORS, expect, judge

Array = np.ndarray[Any, Any]
EXACT = 1e-12
INF = math.inf

# --- backends: `ArrayBackend` on a namespace ------------------------------------------------------


def plain_info(name: str, cls: str, library: str) -> BackendInfo:
    """Return a declaration of every feature except those that only a framework can have."""
    unsupported = {
        "autodiff",
        "double_backward",
        "vmap",
        "jvp",
        "compile",
        "dropout",
        "axis_name",
        "group",
    }
    return BackendInfo(
        name=name,
        load=f"{__name__}:{cls}",
        library=library,
        requires=(library,),
        capabilities={f: "unsupported" if f in unsupported else "full" for f in FEATURES},
    )


class PlainNumpy(ArrayBackend):
    """`ArrayBackend` on NumPy, with small blocks so that small calls have several."""

    info = plain_info("plain_numpy", "PlainNumpy", "numpy")
    query_block = 4
    key_block = 3


class Strict(ArrayBackend):
    """`ArrayBackend` on array-api-strict, which raises for calls outside of the standard."""

    info = plain_info("plain_strict", "Strict", "array_api_strict")
    query_block = 4
    key_block = 3


# --- calls ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A spec and NumPy arrays that fit it.

    `call` may contain mask, key_mask, bias, offset and params.
    """

    spec: AttentionSpec
    q: Array
    k: Array
    v: Array
    call: Mapping[str, Any]

    def __repr__(self) -> str:
        shapes = {
            name: x.tolist()
            if name == "offset" and isinstance(x, np.ndarray)
            else {n: p.shape for n, p in x.items()}
            if isinstance(x, Mapping)
            else getattr(x, "shape", x)
            for name, x in self.call.items()
        }
        return f"Case({self.spec}, q {self.q.shape}, k {self.k.shape}, v {self.v.shape}, {shapes})"

    @property
    def qkv(self) -> tuple[Array, Array, Array]:
        return self.q, self.k, self.v

    @property
    def differentiable(self) -> dict[str, Array]:
        """The arrays that have a gradient, by name."""
        arrays = {"q": self.q, "k": self.k, "v": self.v}
        if self.call.get("bias") is not None:
            arrays["bias"] = self.call["bias"]
        for p in self.spec.parameters():
            if p.differentiable and p.name in (self.call.get("params") or {}):
                arrays[p.name] = self.call["params"][p.name]
        return arrays

    def replaced(self, arrays: Mapping[str, Array]) -> Case:
        """Return the case with some arrays replaced, by name."""
        call = dict(self.call)
        if "bias" in arrays:
            call["bias"] = arrays["bias"]
        params = dict(call.get("params") or {})
        params.update({n: x for n, x in arrays.items() if n not in ("q", "k", "v", "bias")})
        if params:
            call["params"] = params
        qkv = {name: arrays[name] for name in ("q", "k", "v") if name in arrays}
        return replace(self, call=call, **qkv)

    def cast(self, dtype: Any) -> Case:
        """Return the case with every floating array cast to a dtype."""
        return replace(
            self,
            q=self.q.astype(dtype),
            k=self.k.astype(dtype),
            v=self.v.astype(dtype),
            call=mapped(
                self.call,
                lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x,
            ),
        )

    def plan(self) -> Plan:
        """Return the plan of the spec for these arrays."""
        return lower(
            self.spec,
            Signature(
                self.q.shape[-1],
                self.k.shape[-3],
                str(self.q.dtype),
                self.call.get("mask") is not None,
            ),
        )

    def inputs(self, asarray: Callable[[Array], Any] = lambda x: x) -> Inputs:
        """Return the arrays as the inputs of a backend, each converted by `asarray`."""
        call = mapped(self.call, asarray)
        call["params"] = call.get("params") or {}
        return Inputs(*(asarray(x) for x in self.qkv), **call)

    def reference(self, spec: AttentionSpec | None = None) -> tuple[Array, Array]:
        """Return out and lse by the oracle."""
        out, lse = reference_attention(*self.qkv, spec or self.spec, return_lse=True, **self.call)
        return out, lse

    def weights(self) -> Array:
        """Return the weights by the oracle."""
        weights: Array = reference_weights(*self.qkv, self.spec, **self.call)
        return weights


def mapped(call: Mapping[str, Any], function: Callable[[Array], Any]) -> dict[str, Any]:
    """Apply a function to every array of a call, including those of params."""
    result: dict[str, Any] = {}
    for name, x in call.items():
        if isinstance(x, Mapping):
            result[name] = mapped(x, function)
        else:
            result[name] = function(x) if isinstance(x, np.ndarray) else x
    return result


def normal_case(
    spec: str | AttentionSpec,
    *,
    seed: int = 0,
    lead: tuple[int, ...] = (2,),
    heads: int = 2,
    group: int = 2,
    n: int = 5,
    m: int = 7,
    d: int = 3,
    dv: int = 2,
    mean: float = 0.0,
    sd: float = 1.0,
    dtype: Any = np.float64,
    **call: Any,
) -> Case:
    """Draw a case from normal distributions; `mean` and `sd` are those of queries and keys."""
    rng = np.random.default_rng(seed)
    spec = as_spec(spec)
    q = mean + sd * rng.standard_normal((*lead, heads * group, n, d))
    k = mean + sd * rng.standard_normal((*lead, heads, m, d))
    v = rng.standard_normal((*lead, heads, m, dv))
    params = {}
    for p in spec.parameters():
        shape = tuple({"H": heads, "Hq": heads * group, "D": d}.get(s, s) for s in p.shapes[-1])  # type: ignore[call-overload]
        params[p.name] = rng.uniform(0.5, 1.5, size=shape)
    if params:
        call = {"params": params, **call}
    return Case(spec, q, k, v, call).cast(dtype)


# --- comparing ------------------------------------------------------------------------------------


def assert_close(
    got: Any, want: Array, scale: Any, tolerance: float = EXACT, what: str = ""
) -> None:
    """Assert that entries agree within `tolerance * scale`; infinities must agree exactly."""
    got = np.asarray(got, dtype=np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), err_msg=what)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=what)
    error = np.abs(np.where(finite, got, 0.0) - np.where(finite, want, 0.0))
    bound = tolerance * np.broadcast_to(scale, want.shape)
    worst = np.max(error - bound, initial=-1.0)
    assert worst <= 0.0, f"{what}: error {np.max(error):.3g} exceeds its bound by {worst:.3g}"


def check_forward(
    case: Case, out: Any, lse: Any, weights: Any = None, tolerance: float = EXACT
) -> None:
    """Assert that out, lse and weights agree with the oracle.

    The scale of out is the largest sum_j |w_ij v_j| of a head, as values that cancel do not make
    the sum more exact. Rows whose kernel values are almost 0 (`fragile`) are left out, since there
    rounding decides between zeros and an average.
    """
    want, want_lse = case.reference()
    want_weights = np.abs(case.weights())
    values = np.repeat(np.abs(case.v), case.q.shape[-3] // case.k.shape[-3], axis=-3)
    size = np.max(want_weights @ values, axis=(-2, -1), keepdims=True, initial=0.0)
    sound = ~fragile(case)
    out, lse = np.asarray(out), np.asarray(lse)
    assert_close(
        np.where(sound[..., None], out, 0.0),
        np.where(sound[..., None], want, 0.0),
        size,
        tolerance,
        "out",
    )
    level = 1.0 + np.abs(np.where(np.isfinite(want_lse), want_lse, 0.0))
    assert_close(np.where(sound, lse, 0.0), np.where(sound, want_lse, 0.0), level, tolerance, "lse")
    if weights is not None:
        size = np.max(want_weights, axis=(-2, -1), keepdims=True, initial=0.0)
        rows = sound[..., None]
        assert_close(
            np.where(rows, np.asarray(weights), 0.0),
            np.where(rows, case.weights(), 0.0),
            size,
            tolerance,
            "weights",
        )


def check_budget(case: Case, out: Any, lse: Any) -> None:
    """Assert that out and lse are within the error budget of their dtype.

    lse is a logarithm: a relative error eps of h is an absolute error eps of lse, whatever the size
    of lse. Without the floor, a head whose lse is close to 0 would have no budget.
    """
    verdicts = judge({"out": out, "lse": lse}, expect(*case.qkv, case.spec, **case.call))
    assert verdicts["out"].ok, f"{case}: out {verdicts['out']}"
    dtype = str(lse.dtype)
    floor = FACTORS[dtype] * EPS[dtype]
    assert verdicts["lse"].error <= verdicts["lse"].budget + floor, f"{case}: lse {verdicts['lse']}"


def fragile(case: Case) -> Array:
    """Return which rows are ill-conditioned: those that see keys, but kernel values close to 0."""
    if not isinstance(case.spec.kernel, Polynomial | Relu):
        return np.zeros(case.q.shape[:-1], dtype=bool)
    level = case.reference(replace(case.spec, normaliser="sum"))[1]
    count = case.reference(replace(case.spec, normaliser="count", sink=None))[1]
    return (count > -INF) & (level < -12.0)


def central_difference(
    function: Callable[[Array], Any], x: Array, direction: Array, step: float = 1e-3
) -> float:
    """Return the derivative along a direction, by differences of fourth order in the step."""
    near = function(x + step * direction) - function(x - step * direction)
    far = function(x + 2 * step * direction) - function(x - 2 * step * direction)
    return float((8 * near - far) / (12 * step))


def kink(function: Callable[[Array], Any], x: Array, direction: Array, step: float) -> float:
    """Return how much the slopes on both sides differ: O(step) where there is no kink."""
    sides = function(x + step * direction) + function(x - step * direction)
    return float(abs(sides - 2 * function(x)) / step)


def check_gradients(
    case: Case,
    gradients: Mapping[str, Any],
    d_out: Array,
    d_lse: Array,
    seed: int = 0,
    tolerance: float = 1e-7,
) -> bool:
    """Assert that gradients agree with central differences of the oracle in longdouble.

    Returns
    -------
    bool
        False where the oracle has a kink at or between the points of a difference, so that there
        is no comparison: two step sizes give different derivatives, or the slopes on both sides do
        not approach each other.
    """
    rng = np.random.default_rng(seed)
    assert set(gradients) >= set(case.differentiable)
    wide = case.cast(np.longdouble)
    finite = np.isfinite(case.reference()[1])

    def objective(name: str) -> Callable[[Array], Any]:
        def value(x: Array) -> Any:
            out, lse = wide.replaced({name: x}).reference()
            return np.sum(out * d_out) + np.sum(np.where(finite, lse, 0.0) * d_lse)

        return value

    for name, x in case.differentiable.items():
        gradient = np.asarray(gradients[name])
        assert gradient.shape == x.shape, name
        assert np.isfinite(gradient).all(), name
        # A bias of -inf stays -inf, and has no gradient.
        direction = np.where(np.isfinite(x), rng.standard_normal(x.shape), 0.0)
        np.testing.assert_array_equal(gradient[~np.isfinite(x)], 0.0)
        at = x.astype(np.longdouble)
        function = objective(name)
        numeric = central_difference(function, at, direction)
        other = central_difference(function, at, direction, step=3.7e-4)
        terms = gradient * direction
        # The size of the sum if the signs of the terms were random, and a floor for empty sums.
        scale = max(abs(numeric), float(np.sqrt(np.sum(terms * terms))), 1e-3)
        if abs(numeric - other) > 0.1 * tolerance * scale:
            return False
        if isinstance(case.spec.kernel, Relu) and name != "v":
            kinks = [kink(function, at, direction, step) for step in (1e-3, 1e-4)]
            if kinks[1] > 1e-9 * scale and kinks[1] > 0.5 * kinks[0]:
                return False
        error = abs(numeric - float(np.sum(terms)))
        assert error <= tolerance * scale, (
            f"{case}: gradient of {name} is off by {error / scale:.3g}: {np.sum(terms)}, "
            f"expected {numeric}"
        )
    return True


def cotangents(case: Case, lse: Any, seed: int = 1) -> tuple[Array, Array]:
    """Draw cotangents of out and lse; the cotangent is 0 where lse is -inf."""
    rng = np.random.default_rng(seed)
    d_out = rng.standard_normal((*case.q.shape[:-1], case.v.shape[-1]))
    d_lse = np.where(np.isfinite(np.asarray(lse)), rng.standard_normal(case.q.shape[:-1]), 0.0)
    return d_out, d_lse


def run(
    backend: Backend,
    case: Case,
    asarray: Callable[[Array], Any] = lambda x: x,
    plan: Plan | None = None,
) -> tuple[Any, Any]:
    """Run a case on a backend without dispatch; return out and lse."""
    return backend.attention(plan or case.plan(), case.inputs(asarray), lse=True)
