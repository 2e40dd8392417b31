"""What the tests of the core draw and compare: specs over all axes, and calls that fit them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pdcore.backend import FEATURES, ArrayBackend, Backend, BackendInfo, Inputs
from pdcore.lowering import Plan, Signature, lower
from pdcore.reference import reference_attention, reference_weights
from pdcore.spec import (
    AttentionSpec,
    Batch,
    Cosine,
    Elu,
    Exponential,
    Gaussian,
    HeadScaling,
    Identity,
    Kernel,
    Normalization,
    Polynomial,
    RandomFeatures,
    Relu,
    Support,
    as_spec,
)
from pdcore_conformance.judge.budget import EPS, FACTORS, expect, judge

Array = np.ndarray[Any, Any]
EXACT = 1e-12
INF = math.inf

# --- backends that are a namespace and nothing else -----------------------------------------------


def plain_info(name: str, cls: str, library: str) -> BackendInfo:
    """Declare everything but what only a framework has."""
    framework = {"autodiff", "double_backward", "vmap", "jvp", "compile", "dropout", "axis_name"}
    return BackendInfo(
        name=name,
        load=f"{__name__}:{cls}",
        library=library,
        requires=(library,),
        capabilities={f: "unsupported" if f in framework else "full" for f in FEATURES},
    )


class PlainNumpy(ArrayBackend):
    """`ArrayBackend` on NumPy, with small blocks so that small calls have several."""

    info = plain_info("plain_numpy", "PlainNumpy", "numpy")
    query_block = 4
    key_block = 3


class Strict(ArrayBackend):
    """`ArrayBackend` on array-api-strict, which refuses what the standard does not promise."""

    info = plain_info("plain_strict", "Strict", "array_api_strict")
    query_block = 4
    key_block = 3


# --- calls ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call: a spec and NumPy arrays that fit it.

    `call` may hold mask, key_mask, bias, offset and params.
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
        found = {"q": self.q, "k": self.k, "v": self.v}
        if self.call.get("bias") is not None:
            found["bias"] = self.call["bias"]
        for p in self.spec.parameters():
            if p.differentiable and p.name in (self.call.get("params") or {}):
                found[p.name] = self.call["params"][p.name]
        return found

    def replaced(self, arrays: Mapping[str, Array]) -> Case:
        """Replace some of the arrays, given by name."""
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
        """Cast every floating array."""
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
        """Lower the spec for these arrays."""
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
        """Give the arrays as a backend takes them, in another library by `asarray`."""
        call = mapped(self.call, asarray)
        call["params"] = call.get("params") or {}
        return Inputs(*(asarray(x) for x in self.qkv), **call)

    def reference(self, spec: AttentionSpec | None = None) -> tuple[Array, Array]:
        """Give the oracle's out and lse."""
        out, lse = reference_attention(*self.qkv, spec or self.spec, return_lse=True, **self.call)
        return out, lse

    def weights(self) -> Array:
        """Give the oracle's weights."""
        found: Array = reference_weights(*self.qkv, self.spec, **self.call)
        return found


def mapped(call: Mapping[str, Any], function: Callable[[Array], Any]) -> dict[str, Any]:
    """Apply a function to every array of a call, those of params included."""
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
    """Draw a call from normal distributions; queries and keys have this mean and deviation."""
    rng = np.random.default_rng(seed)
    spec = as_spec(spec)
    q = mean + sd * rng.standard_normal((*lead, heads * group, n, d))
    k = mean + sd * rng.standard_normal((*lead, heads, m, d))
    v = rng.standard_normal((*lead, heads, m, dv))
    params = {}
    for p in spec.parameters():
        shape = tuple({"H": heads, "D": d}.get(s, s) for s in p.shapes[-1])  # type: ignore[call-overload]
        params[p.name] = rng.uniform(0.5, 1.5, size=shape)
    if params:
        call = {"params": params, **call}
    return Case(spec, q, k, v, call).cast(dtype)


# --- comparing ------------------------------------------------------------------------------------


def assert_close(
    got: Any, want: Array, scale: Any, tolerance: float = EXACT, what: str = ""
) -> None:
    """Compare entry by entry, in units of `scale`; infinities must agree exactly."""
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
    """Compare out, lse and weights with the oracle.

    Out is measured in units of sum_j |w_ij v_j|, at the row of the head where that is largest:
    values that cancel do not make the sum more exact. Rows whose kernel values all but vanish
    (`fragile`) are left out, since there a rounding decides between zeros and an average.
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
    """Hold out and lse against the error budget of their dtype.

    An lse is a logarithm: h known to a relative eps is an lse known to an absolute eps, whatever
    its own size. One head whose lse happens to be next to 0 has no budget without it.
    """
    verdicts = judge({"out": out, "lse": lse}, expect(*case.qkv, case.spec, **case.call))
    assert verdicts["out"].ok, f"{case}: out {verdicts['out']}"
    dtype = str(lse.dtype)
    floor = FACTORS[dtype] * EPS[dtype]
    assert verdicts["lse"].error <= verdicts["lse"].budget + floor, f"{case}: lse {verdicts['lse']}"


def fragile(case: Case) -> Array:
    """Say which rows are ill-conditioned: visible keys, but kernel values next to 0."""
    if not isinstance(case.spec.kernel, Polynomial | Relu):
        return np.zeros(case.q.shape[:-1], dtype=bool)
    level = case.reference(replace(case.spec, normaliser="sum"))[1]
    count = case.reference(replace(case.spec, normaliser="count"))[1]
    return (count > -INF) & (level < -12.0)


def central_difference(
    function: Callable[[Array], Any], x: Array, direction: Array, step: float = 1e-3
) -> float:
    """Differentiate along a direction, to fourth order in the step."""
    near = function(x + step * direction) - function(x - step * direction)
    far = function(x + 2 * step * direction) - function(x - 2 * step * direction)
    return float((8 * near - far) / (12 * step))


def bend(function: Callable[[Array], Any], x: Array, direction: Array, step: float) -> float:
    """Give by how much the slopes to both sides differ: O(step) where there is no kink."""
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
    """Compare directional derivatives with central differences of the oracle in longdouble.

    Returns
    -------
    bool
        False where the oracle itself has a kink at or between the points of a difference, so that
        nothing can be said: two steps give two derivatives, or the slopes to both sides do not
        approach each other.
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
        # What the terms would sum to if their signs were random, and a floor for sums of nothing.
        scale = max(abs(numeric), float(np.sqrt(np.sum(terms * terms))), 1e-3)
        if abs(numeric - other) > 0.1 * tolerance * scale:
            return False
        if isinstance(case.spec.kernel, Relu) and name != "v":
            bends = [bend(function, at, direction, step) for step in (1e-3, 1e-4)]
            if bends[1] > 1e-9 * scale and bends[1] > 0.5 * bends[0]:
                return False
        error = abs(numeric - float(np.sum(terms)))
        assert error <= tolerance * scale, (
            f"{case}: gradient of {name} is off by {error / scale:.3g}: {np.sum(terms)}, "
            f"expected {numeric}"
        )
    return True


def cotangents(case: Case, lse: Any, seed: int = 1) -> tuple[Array, Array]:
    """Draw cotangents of out and lse; those of an lse of -inf are 0."""
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
    """Run a case on a backend, without selection; give out and lse."""
    return backend.attention(plan or case.plan(), case.inputs(asarray), lse=True)


# --- strategies -----------------------------------------------------------------------------------

SCALES = st.sampled_from([None, 0.25, 0.8])

#: Kernels by what a spec may ask of them.
KERNELS: st.SearchStrategy[Kernel] = st.one_of(
    st.just(Exponential()),
    st.builds(Exponential, scale=SCALES, softcap=st.sampled_from([None, 0.7, 3.0])),
    st.builds(Gaussian, gamma=st.sampled_from([0.1, 0.4])),
    st.builds(Cosine, scale=st.sampled_from([1.0, 2.5])),
    st.builds(
        Polynomial,
        degree=st.sampled_from([2, 4]),
        coef0=st.sampled_from([0.0, 0.5, 1.0]),
        scale=SCALES,
    ),
    st.just(Elu()),
    st.just(Relu()),
    st.builds(RandomFeatures, count=st.integers(1, 6), seed=st.integers(0, 3), scale=SCALES),
)

SUPPORTS = st.builds(
    Support,
    causal=st.booleans(),
    left=st.sampled_from([INF, INF, 0, 1, 3]),
    right=st.sampled_from([INF, INF, 0, 2, 5]),
)


@st.composite
def specs(
    draw: st.DrawFn, heads: int, kernels: st.SearchStrategy[Kernel] = KERNELS
) -> AttentionSpec:
    """Draw a spec that is not refused, for a number of key heads."""
    kernel, support = draw(kernels), draw(SUPPORTS)
    plain = isinstance(kernel, Exponential) and kernel.softcap is None
    normalization: Normalization = Identity()
    if draw(st.booleans()):
        scopes = ["sequence", "batch", "running", *(["prefix"] * 3 if plain else [])]
        statistics = draw(st.sampled_from(scopes))
        normalization = Batch(
            beta=draw(st.sampled_from([1.0, 0.5, 0.0, "param"])),
            # Large, so that one key, whose variance is 0, is not an ill-conditioned case.
            eps=draw(st.sampled_from([0.25, 1.0])),
            statistics=statistics,
            allow_leak=support.ahead == 0 and statistics in ("sequence", "batch"),
        )
    scaling = HeadScaling()
    widest = int(min(4, support.left + support.right + 1))
    if draw(st.booleans()):
        scaling = HeadScaling(
            tuple(draw(st.integers(1, widest)) for _ in range(heads)),
            draw(st.sampled_from(["mean", "first"])),
        )
    normaliser = draw(st.sampled_from(["sum", "count", "one"]))
    return AttentionSpec(kernel, normaliser, normalization, scaling, support)


@st.composite
def values(
    draw: st.DrawFn, shape: tuple[int, ...], bound: float = 3.0, dense: bool = False
) -> Array:
    """Draw an array: entries of Hypothesis's choice, or dense ones from a normal distribution."""
    if dense or draw(st.booleans()):
        seed = draw(st.integers(0, 2**16))
        return np.clip(np.random.default_rng(seed).standard_normal(shape), -bound, bound)
    steps = st.integers(-int(16 * bound), int(16 * bound)).map(lambda i: i / 16)
    return draw(hnp.arrays(np.float64, shape, elements=steps))


def broadcastable(full: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw a shape that broadcasts to `full`, of at most its rank."""
    return st.tuples(
        st.integers(1, len(full)), st.lists(st.booleans(), min_size=len(full), max_size=len(full))
    ).map(
        lambda drawn: tuple(1 if one else size for one, size in zip(drawn[1], full, strict=True))[
            -drawn[0] :
        ]
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    largest: int = 9,
    smallest: int = 0,
    dense: bool = False,
    kernels: st.SearchStrategy[Kernel] = KERNELS,
) -> Case:
    """Draw a spec and a call of it, float64, every argument that it can have.

    Of queries, keys and values that are not `dense`, many entries are equal or 0.
    """
    lead = draw(st.sampled_from([(), (1,), (2,), (2, 2)]))
    heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    n, m = draw(st.integers(smallest, largest)), draw(st.integers(smallest, largest))
    d, dv = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    spec = draw(specs(heads, kernels))
    full = (*lead, heads * group, n, m)
    call: dict[str, Any] = {}
    masks = st.integers(0, 2**16).map(np.random.default_rng)
    if draw(st.booleans()):
        call["key_mask"] = draw(masks).random((*lead, m)) < 0.75
    if draw(st.integers(0, 3)) == 0:
        call["mask"] = draw(masks).random(draw(broadcastable(full))) < 0.75
    if spec.kernel.has_log and spec.heads.largest == 1 and draw(st.integers(0, 2)) == 0:
        shape = draw(broadcastable(full))
        bias = draw(values(shape, 1.0))
        call["bias"] = np.where(draw(masks).random(shape) < 0.15, -INF, bias)
    offset = draw(st.sampled_from(["none", "int", "scalar", "sequence", "end"]))
    if offset == "end":
        call["offset"] = "end"
    elif offset == "int":
        call["offset"] = draw(st.integers(-3, 9))
    elif offset != "none":
        shape = () if offset == "scalar" else lead
        call["offset"] = np.asarray(draw(masks).integers(-3, 9, size=shape))
    params = {}
    for p in spec.parameters():
        sizes = {"H": heads, "D": d}
        shape = tuple(sizes[s] for s in draw(st.sampled_from(p.shapes)))  # type: ignore[index]
        params[p.name] = draw(values(shape, 1.0))
        if p.name == "var":
            params[p.name] = 0.25 + np.abs(params[p.name])
    if params:
        call["params"] = params
    shapes = [(*lead, heads * group, n, d), (*lead, heads, m, d), (*lead, heads, m, dv)]
    q, k, v = (draw(values(shape, dense=dense)) for shape in shapes)
    return Case(spec, q, k, v, call)
