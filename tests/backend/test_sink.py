"""The laws of a sink in the normaliser, on NumPy and array-api-strict, against the oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
from reference_cases import Strict, normal_case

import pdcore
from pdcore.backend import ArrayBackend, Inputs
from pdcore.lowering import Signature, lower
from pdcore.plugins import load_backend
from pdcore.reference import reference_attention

INF = math.inf
PARAM = "h(sum,sink=param)"
#: One sink for each of four query heads, of which the last has none.
SINKS = np.array([0.7, -2.0, 3.0, -INF])
SPECS = [
    "softmax",
    "softmax(softcap=2)",
    "gaussian(0.3)",
    "cosine",
    "polynomial",
    "bn(beta=0.5)",
    "causal+bn(statistics=prefix,eps=0.3)",
    "causal+sh(1,2)",
    "sparse(1,1)",
]


def drawn(seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(2, 4, 7, 5)),
        rng.normal(size=(2, 2, 9, 5)),
        rng.normal(size=(2, 2, 9, 3)),
    )


def on_strict(x: Any, spec: str, sink: Any, d_out: Any, d_lse: Any) -> Any:
    backend, xp = Strict(), array_api_strict
    plan = lower(pdcore.parse(spec), Signature(5, 2, "float64"))
    inputs = Inputs(*map(xp.asarray, x), params={"sink": xp.asarray(sink)})
    with np.errstate(all="ignore"):
        out, lse, vjp = backend.attention_vjp(plan, inputs)
        gradients = vjp(xp.asarray(d_out), xp.asarray(d_lse))
    results = {"out": out, "lse": lse, **gradients}
    return {name: np.asarray(value) for name, value in results.items()}


@pytest.mark.parametrize("words", SPECS)
def test_out_lse_and_gradients_are_those_of_the_formula(words: str) -> None:
    # out' = out w and L' = logaddexp(L, s), differentiated by hand around the call without a sink.
    x, sink = drawn(), SINKS[:, None]
    out, lse, vjp = pdcore.attention_vjp(*x, words)
    level = np.logaddexp(lse, sink)
    empty = level == -INF
    gap = np.where(empty, -INF, lse - np.where(empty, 0.0, level))
    w, share = np.exp(gap), np.exp(np.where(empty, -INF, sink - np.where(empty, 0.0, level)))
    rng = np.random.default_rng(1)
    d_out, d_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape)
    inner = (d_out * out).sum(-1)
    wanted = dict(vjp(d_out * w[..., None], w * d_lse + w * share * inner))
    wanted |= {"out": out * w[..., None], "lse": level}
    wanted["sink"] = (share * (d_lse - w * inner)).sum((0, -1))
    got_out, got_lse, pull = pdcore.attention_vjp(*x, f"{words}+{PARAM}", params={"sink": SINKS})
    got = {"out": got_out, "lse": got_lse, **pull(d_out, d_lse)}
    strict = on_strict(x, f"{words}+{PARAM}", SINKS, d_out, d_lse)
    assert got.keys() == strict.keys() == wanted.keys()
    assert got["sink"][-1] == 0
    for name, expected in wanted.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(strict[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)


def test_no_sink_is_minus_infinity() -> None:
    x = drawn()
    none = {"sink": np.full(4, -INF)}
    for spec in SPECS:
        got = pdcore.attention(*x, f"{spec}+{PARAM}", params=none, return_lse=True)
        for a, b in zip(got, pdcore.attention(*x, spec, return_lse=True), strict=True):
            np.testing.assert_array_equal(a, b)


def test_one_number_is_the_sink_of_all_heads() -> None:
    x = drawn()
    for number in (0, -1.5):
        given = {"sink": np.full(4, float(number))}
        many = pdcore.attention(*x, PARAM, params=given, return_lse=True)
        one = pdcore.attention(*x, f"h(sum,sink={number})", return_lse=True)
        for a, b in zip(one, many, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_row_that_sees_no_key_has_the_sink_alone() -> None:
    q, k, v = drawn()
    mask = np.zeros((7, 9), bool)
    mask[3:] = True
    out, lse, vjp = pdcore.attention_vjp(q, k, v, PARAM, mask=mask, params={"sink": SINKS})
    np.testing.assert_array_equal(out[..., :3, :], 0)
    np.testing.assert_array_equal(lse[..., :3], np.broadcast_to(SINKS[:, None], (2, 4, 3)))
    d_lse = np.zeros(lse.shape)
    d_lse[..., :3] = 1  # dL'/ds = 1, and 0 where s = -inf
    gradients = vjp(np.zeros_like(out), d_lse)
    np.testing.assert_array_equal(gradients["sink"], [6, 6, 6, 0])
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(gradients[name], 0)


def test_the_gradient_is_a_difference_quotient() -> None:
    case = normal_case(PARAM, seed=3)
    rng = np.random.default_rng(3)
    sink = rng.normal(size=case.q.shape[-3])
    call = {**case.call, "params": {"sink": sink}}
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **call)
    d_out, d_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape)
    slope, step = vjp(d_out, d_lse)["sink"], 1e-5

    def loss(head: int, by: float) -> float:
        moved = sink + by * (np.arange(len(sink)) == head)
        more = {**call, "params": {"sink": moved}}
        out, lse = reference_attention(*case.qkv, case.spec, return_lse=True, **more)
        return float((out * d_out).sum() + (lse * d_lse).sum())

    for head, value in enumerate(slope):
        quotient = (loss(head, step) - loss(head, -step)) / (2 * step)
        np.testing.assert_allclose(value, quotient, rtol=1e-7, atol=1e-8)


def test_parts_merge_with_the_sink_in_one_of_them() -> None:
    q, k, v = drawn()
    given = {"params": {"sink": SINKS}, "return_lse": True}
    whole = pdcore.attention(q, k, v, PARAM, **given)

    def merged(*sinks: bool) -> Any:
        parts = [
            pdcore.attention(q, k[:, :, cut], v[:, :, cut], PARAM, **given)
            if sink
            else pdcore.attention(q, k[:, :, cut], v[:, :, cut], return_lse=True)
            for cut, sink in zip((slice(0, 4), slice(4, 9)), sinks, strict=True)
        ]
        lse = np.logaddexp(parts[0][1], parts[1][1])
        return sum(out * np.exp(level - lse)[..., None] for out, level in parts), lse

    for sinks in ((True, False), (False, True)):
        for a, b in zip(merged(*sinks), whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    assert abs(merged(True, True)[0] - whole[0]).max() > 1e-2  # in both it counts twice


def test_weights_sum_to_less_than_one() -> None:
    q, k, v = drawn()
    given = {"params": {"sink": SINKS}}
    weights = pdcore.attention_weights(q, k, v, f"sh(1,2)+{PARAM}", **given)
    assert (weights.sum(-1)[:, :3] < 1).all()
    np.testing.assert_allclose(weights.sum(-1)[:, 3], 1, rtol=1e-12)
    out = pdcore.attention(q, k, v, f"sh(1,2)+{PARAM}", **given)
    np.testing.assert_allclose(weights @ np.repeat(v, 2, 1), out, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sinks_are_in_the_dtype_of_the_call_or_in_float32(dtype: str) -> None:
    x = tuple(a.astype(dtype) for a in drawn())
    for kind in {dtype, "float32"}:
        given = {"sink": SINKS.astype(kind)}
        out, lse, vjp = pdcore.attention_vjp(*x, PARAM, params=given)
        assert (str(out.dtype), str(lse.dtype)) == (dtype, "float32")
        assert vjp(np.ones_like(out))["sink"].dtype == kind
    with pytest.raises(TypeError, match=r"params\['sink'\].*float64"):
        pdcore.attention(*x, PARAM, params={"sink": SINKS})


def test_there_is_one_sink_for_each_query_head() -> None:
    x = drawn()
    with pytest.raises(ValueError, match=r"params\['sink'\].*\(2,\), expected \(4,\)"):
        pdcore.attention(*x, PARAM, params={"sink": np.zeros(2)})
    with pytest.raises(ValueError, match=r"'sink' is missing.*\(4,\)"):
        pdcore.attention(*x, PARAM)
    with pytest.raises(ValueError, match=r"no parameter 'sink'"):
        pdcore.attention(*x, "h(sum,sink=0)", params={"sink": np.zeros(4)})


def test_a_plan_says_what_it_is_and_who_runs_it() -> None:
    spec = pdcore.parse(f"bn+{PARAM}")
    x = drawn()
    explanation = pdcore.explain(*x, spec, params={"sink": SINKS})
    assert "sink s: out exp(L - L') with L' = log(exp L + exp s)" in explanation.plan.steps
    assert explanation.to_dict()["plan"]["sink"] == "param"
    assert explanation.plan.rescales
    assert explanation.plan.by_query_head == ("sink",)
    assert not lower(replace(spec, sink=None), Signature(5, 2, "float64")).rescales

    class Without(ArrayBackend):
        info = replace(
            load_backend("numpy").info, capabilities={"exponential": "full", "float64": "full"}
        )

    refusals = Without().refusals(explanation.request)
    assert "a sink in the normaliser h(sum): not implemented" in refusals
