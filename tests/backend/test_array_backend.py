"""`ArrayBackend`: complete with a namespace, one step replaceable at a time, traceable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
from array_backend_cases import SPECS, full_case
from reference_cases import (
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
from pdcore.backend import ArrayBackend, Backend, BackendInfo
from pdcore.errors import UnsupportedError
from pdcore.plugins import registry as plugins

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
