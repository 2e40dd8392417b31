"""`ArrayBackend`: complete with a namespace, one step replaceable at a time, traceable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
from reference_cases import (
    Array,
    Case,
    PlainNumpy,
    Strict,
    check_forward,
    check_gradients,
    cotangents,
    mapped,
    normal_case,
    plain_info,
    run,
)

import pdcore
from pdcore.backend import ArrayBackend, Backend, BackendInfo, Inputs
from pdcore.errors import UnsupportedError
from pdcore.lowering import Plan
from pdcore.plugins import registry as plugins

SPECS = [
    "softmax",
    "softmax(softcap=2)+causal",
    "gaussian(gamma=0.3)+h(count)",
    "cosine(scale=2)+sparse(2,1)",
    "polynomial(degree=4)+h(one)",
    "linear",
    "linear+causal",
    "linear+causal+sh(1,2)+h(count)",
    "relu+sparse(2,2)",
    "random_features(6,1)",
    "random_features(6,1)+causal",
    "bn",
    "bn(beta=param,eps=0.1)+sh(1,2)",
    "bn(statistics=batch,eps=0.1)+h(count)",
    "bn(statistics=running,beta=param)+causal",
    "causal+bn(statistics=prefix,eps=0.1)",
    "bn(statistics=prefix,beta=param,eps=0.1)+sh(2,3)",
    "sh(3,2,pool=first)+causal",
    "gaussian(gamma=0.3)+bn(eps=0.1)",
    "linear+bn(beta=0.5,eps=0.1)",
]


def full_case(text: str, offset: Any = 2) -> Case:
    """Draw a call with every argument that the spec can have."""
    case = normal_case(text, n=6, m=9, seed=11)
    rng = np.random.default_rng(12)
    call: dict[str, Any] = {"key_mask": rng.random((2, 9)) < 0.8, "offset": offset, **case.call}
    if "linear" not in text and "features" not in text:
        call["mask"] = rng.random((2, 1, 6, 9)) < 0.8
    if case.spec.kernel.has_log and case.spec.heads.largest == 1:
        call["bias"] = rng.normal(size=(4, 6, 9))
    return replace(case, call=call)


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 64])
@pytest.mark.parametrize("text", SPECS)
def test_blocks_do_not_matter(text: str, size: int) -> None:
    class Blocked(PlainNumpy):
        query_block = size
        key_block = 7 - min(size, 5)

    case = full_case(text)
    out, lse, vjp = Blocked().attention_vjp(case.plan(), case.inputs())
    check_forward(case, out, lse, Blocked().attention_weights(case.plan(), case.inputs()))
    d_out, d_lse = cotangents(case, lse)
    whole = PlainNumpy().attention_vjp(case.plan(), case.inputs())[2](d_out, d_lse)
    for name, x in vjp(d_out, d_lse).items():
        np.testing.assert_allclose(
            x, whole[name], rtol=0, atol=1e-12 * np.max(np.abs(whole[name]), initial=1.0)
        )


@pytest.mark.parametrize("text", SPECS)
def test_the_default_blocks(text: str) -> None:
    class Default(ArrayBackend):
        info = plain_info("default_blocks", "Default", "numpy")

    case = replace(full_case(text), call={})
    if case.spec.parameters():
        case = normal_case(text, n=6, m=9)
    check_forward(case, *run(Default(), case))


# --- one step at a time ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("scores", "softmax"),
        ("scores_vjp", "softmax"),
        ("features", "linear"),
        ("features_vjp", "linear"),
        ("statistics", "bn"),
        ("pool", "sh(1,2)"),
    ],
)
def test_steps_are_replaceable(step: str, text: str) -> None:
    calls = []

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(step)
        return getattr(PlainNumpy, step)(self, *arguments)

    own: Any = type("Own", (PlainNumpy,), {step: counted})
    case = normal_case(text)
    out, lse, vjp = own().attention_vjp(case.plan(), case.inputs())
    check_forward(case, out, lse)
    assert check_gradients(case, vjp(*cotangents(case, lse)), *cotangents(case, lse))
    assert calls


def test_a_wrong_step_shows() -> None:
    class Halved(PlainNumpy):
        def scores(self, c: Any, o: Any) -> Any:
            out, level = super().scores(c, o)
            return 0.5 * out, level

    case = normal_case("softmax")
    with pytest.raises(AssertionError, match="out"):
        check_forward(case, *run(Halved(), case))


# --- registered, behind the public calls ----------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[BackendInfo]:
    pdcore.register_backend(Strict.info)
    with pdcore.use_backend(Strict.info.name):
        yield Strict.info
    plugins.unregister_backend(Strict.info.name)


def strict(case: Case) -> dict[str, Any]:
    arrays = {name: getattr(case, name) for name in "qkv"}
    call = mapped({**arrays, **case.call}, array_api_strict.asarray)
    return {**call, "spec": case.spec}


@pytest.mark.parametrize(
    "text",
    [
        "softmax",
        "bn(beta=param,eps=0.1)+sh(1,2)",
        "linear+causal",
        "causal+bn(statistics=prefix,eps=0.1)",
    ],
)
def test_a_registered_backend_serves_its_library(text: str, registered: BackendInfo) -> None:
    case = full_case(text)
    call = strict(case)
    out, lse = pdcore.attention(**call, return_lse=True)
    weights = pdcore.attention_weights(**call)
    check_forward(case, out, lse, weights)
    again, level, vjp = pdcore.attention_vjp(**call)
    check_forward(case, again, level)
    d_out, d_lse = cotangents(case, lse)
    gradients = vjp(array_api_strict.asarray(d_out), array_api_strict.asarray(d_lse))
    assert check_gradients(case, gradients, d_out, d_lse)
    bound = pdcore.bind(call.pop("spec"), backend="plain_strict")
    np.testing.assert_array_equal(np.asarray(bound(**call)), np.asarray(out))
    said = pdcore.explain(**call, spec=case.spec)
    assert said.backend == "plain_strict"


def test_defaults_of_parameters_are_made_in_the_callers_library(registered: BackendInfo) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Shifted(pdcore.PointwiseKernel):
        word = "shifted"

        def parameters(self) -> tuple[pdcore.Parameter, ...]:
            return (pdcore.Parameter("shift", (("H",),), default=0.5),)

        def log_kappa(self, s: Any, dim: int, **params: Any) -> Any:
            return s + params["shift"]

        def latex(self) -> str:
            return ""

    spec = pdcore.AttentionSpec(Shifted(), "one")
    case = normal_case("softmax")
    x = {name: array_api_strict.asarray(getattr(case, name)) for name in "qkv"}
    given = array_api_strict.asarray([0.5, 0.5])
    default = pdcore.attention(**x, spec=spec)
    np.testing.assert_array_equal(
        np.asarray(default), np.asarray(pdcore.attention(**x, spec=spec, params={"shift": given}))
    )


def test_the_backend_is_not_registered_any_more() -> None:
    x = array_api_strict.ones((1, 2, 3), dtype=array_api_strict.float64)
    with pytest.raises(ValueError, match="unknown backend 'plain_strict'"):
        pdcore.attention(x, x, x, backend="plain_strict")


class Forgetful(ArrayBackend):
    """Declares next to nothing."""

    info = BackendInfo(
        "forgetful",
        f"{__name__}:Forgetful",
        "numpy",
        requires=("numpy",),
        capabilities={"float64": "full", "exponential": "full", "bias": "unsupported"},
    )


@pytest.mark.parametrize(
    ("text", "call", "reason"),
    [
        ("causal", {}, "causal support: not implemented"),
        ("softmax", {"bias": np.zeros((5, 7))}, "additive bias on log kappa: unsupported"),
        ("linear", {}, "feature-map kernels: not implemented"),
        ("sh(1,2)", {}, "heads fitted on pooled keys: not implemented"),
        ("sparse(3,inf)", {}, "windows of positions: not implemented"),
        ("h(one)", {}, "the normalisers h(count) and h(one): not implemented"),
        ("bn", {}, "batch normalization by statistics of this call: not implemented"),
    ],
)
def test_what_is_not_declared_is_refused(text: str, call: dict[str, Any], reason: str) -> None:
    pdcore.register_backend(Forgetful.info)
    try:
        plain = normal_case("softmax", group=1)
        want, _ = plain.reference()
        got = pdcore.attention(*plain.qkv, backend="forgetful")
        np.testing.assert_allclose(got, want, atol=1e-13)
        case = normal_case(text, group=1)
        with pytest.raises(UnsupportedError) as caught:
            pdcore.attention(*case.qkv, case.spec, **call, backend="forgetful")
        assert reason in str(caught.value)
        assert pdcore.attention(*case.qkv, case.spec, **call).shape == want.shape  # by numpy
        with pytest.raises(UnsupportedError, match="attention_vjp: not implemented"):
            pdcore.attention_vjp(*plain.qkv, backend="forgetful")
    finally:
        plugins.unregister_backend("forgetful")


def test_a_backend_has_to_run_plans() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Backend()  # type: ignore[abstract]


# --- tracing: PyTorch -----------------------------------------------------------------------------


class Torch(ArrayBackend):
    """`ArrayBackend` on PyTorch."""

    info = plain_info("plain_torch", "Torch", "torch")
    query_block = 4
    key_block = 3


class Jax(ArrayBackend):
    """`ArrayBackend` on JAX."""

    info = plain_info("plain_jax", "Jax", "jax")
    query_block = 4
    key_block = 3

    @property
    def xp(self) -> Any:
        import jax.numpy

        return jax.numpy


def per_sequence(text: str) -> Case:
    return full_case(text, offset=np.asarray([2, -1]))


def gradients_by_numpy(case: Case, d_out: Array, d_lse: Array) -> dict[str, Array]:
    return PlainNumpy().attention_vjp(case.plan(), case.inputs())[2](d_out, d_lse)


def same_gradients(got: dict[str, Any], want: dict[str, Array]) -> None:
    for name, x in got.items():
        assert x is not None, name
        np.testing.assert_allclose(
            np.asarray(x),
            want[name],
            rtol=0,
            atol=1e-11 * max(np.max(np.abs(want[name])), 1.0),
            err_msg=name,
        )


@pytest.mark.torch
@pytest.mark.parametrize("array_offset", [False, True])
@pytest.mark.parametrize("text", SPECS)
def test_torch_autograd(text: str, array_offset: bool) -> None:
    torch = pytest.importorskip("torch")
    case = per_sequence(text) if array_offset else full_case(text)
    leaves = {n: torch.asarray(x).requires_grad_() for n, x in case.differentiable.items()}
    inputs = with_leaves(case, leaves, torch.asarray)
    out, lse = Torch().attention(case.plan(), inputs, lse=True)
    check_forward(case, out.detach().numpy(), lse.detach().numpy())
    d_out, d_lse = cotangents(case, lse.detach().numpy())
    finite = torch.isfinite(lse)
    loss = torch.sum(out * torch.asarray(d_out))
    loss = loss + torch.sum(torch.where(finite, lse, 0.0) * torch.asarray(d_lse))
    loss.backward()
    want = gradients_by_numpy(case, d_out, d_lse)
    got = {n: x.grad if x.grad is not None else torch.zeros_like(x) for n, x in leaves.items()}
    same_gradients({n: x.numpy() for n, x in got.items()}, want)


@pytest.mark.torch
@pytest.mark.parametrize(
    "text",
    [
        "softmax",
        "bn",
        "linear+causal",
        "sh(1,2)+causal+h(count)",
        "causal+bn(statistics=prefix,eps=0.1)",
    ],
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_dynamo_traces_the_whole(text: str) -> None:
    torch = pytest.importorskip("torch")
    case = per_sequence(text)
    plan, backend = case.plan(), Torch()
    inputs = case.inputs(torch.asarray)
    want = backend.attention(plan, inputs, lse=True)  # the namespace is imported by now

    def call(q: Any, k: Any, v: Any) -> Any:
        return backend.attention(plan, inputs._replace(q=q, k=k, v=v), lse=True)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for got, x in zip(compiled(inputs.q, inputs.k, inputs.v), want, strict=True):
        torch.testing.assert_close(got, x, rtol=0, atol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_keeps_the_dtype(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    case = normal_case("bn+sh(1,2)")
    low = [torch.asarray(x).to(getattr(torch, dtype)) for x in case.qkv]
    out, lse = Torch().attention(case.plan(), Inputs(*low), lse=True)
    assert out.dtype == low[0].dtype
    assert lse.dtype == torch.float32
    wide = [x.to(torch.float64) for x in low]
    want, _ = Torch().attention(case.plan(), Inputs(*wide), lse=True)
    bound = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}[dtype]
    assert float(torch.max(torch.abs(out.to(torch.float64) - want))) < bound


def with_leaves(case: Case, leaves: dict[str, Any], asarray: Any) -> Inputs:
    """Give the inputs of a call with some arrays exchanged for those of a framework."""
    inputs = case.inputs(asarray)
    own = {n: leaves[n] for n in ("q", "k", "v", "bias") if n in leaves}
    params = {**inputs.params, **{n: x for n, x in leaves.items() if n not in own}}
    return inputs._replace(**own, params=params)


# --- tracing: JAX ---------------------------------------------------------------------------------


@pytest.fixture
def jax() -> Iterator[Any]:
    module = pytest.importorskip("jax")
    before = module.config.jax_enable_x64
    module.config.update("jax_enable_x64", True)
    yield module
    module.config.update("jax_enable_x64", before)


#: What takes the time is compiling. (Level 0 gives NaN where level 1 and single operations do not.)
QUICK = {"xla_backend_optimization_level": 1}


#: With positions that are traced; and known ones, where positions matter at all.
COMPILED = [(text, True) for text in SPECS] + [
    (text, False) for text in SPECS if any(w in text for w in ("causal", "sparse", "prefix"))
]


@pytest.mark.jax
@pytest.mark.parametrize(("text", "array_offset"), COMPILED)
def test_jax_jit_and_grad(text: str, array_offset: bool, jax: Any) -> None:
    jnp = jax.numpy
    case = per_sequence(text) if array_offset else full_case(text)
    plan: Plan = case.plan()
    leaves = {n: jnp.asarray(x) for n, x in case.differentiable.items()}
    d_out, d_lse = cotangents(case, case.reference()[1])

    def loss(leaves: dict[str, Any], offset: Any) -> Any:
        inputs = with_leaves(case, leaves, jnp.asarray)
        if array_offset:  # traced as well
            inputs = inputs._replace(offset=offset)
        out, lse = Jax().attention(plan, inputs, lse=True)
        total = jnp.sum(out * d_out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * d_lse)
        return total, (out, lse)

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (_, (out, lse)), got = compiled(leaves, jnp.asarray(case.call["offset"]))
    assert out.dtype == lse.dtype == np.float64
    check_forward(case, out, lse)
    same_gradients(got, gradients_by_numpy(case, d_out, d_lse))


@pytest.mark.jax
@pytest.mark.parametrize("text", ["softmax", "bn(eps=0.1)+sh(1,2)", "linear+causal"])
def test_jax_vmap_is_one_sequence_at_a_time(text: str, jax: Any) -> None:
    case = normal_case(text, lead=(3,), n=6, m=9)
    plan = case.plan()

    def one(q: Any, k: Any, v: Any) -> Any:
        return Jax().attention(plan, Inputs(q, k, v), lse=True)

    out, lse = jax.jit(jax.vmap(one), compiler_options=QUICK)(*map(jax.numpy.asarray, case.qkv))
    check_forward(case, out, lse)


@pytest.mark.jax
def test_jax_recompiles_for_shapes_only(jax: Any) -> None:
    traces = []
    case = normal_case("causal", n=6, m=9)
    plan = case.plan()

    @jax.jit
    def call(q: Any, k: Any, v: Any, offset: Any) -> Any:
        traces.append(1)
        return Jax().attention(plan, Inputs(q, k, v, offset=offset))[0]

    x = [jax.numpy.asarray(a) for a in case.qkv]
    for offset in (0, 3, -2):
        moved = replace(case, call={"offset": offset})
        np.testing.assert_allclose(call(*x, offset), moved.reference()[0], atol=1e-12)
    assert len(traces) == 1
