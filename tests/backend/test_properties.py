"""Random small specs and calls, on every axis at once, against the oracle."""

from __future__ import annotations

import array_api_strict
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from nightly import examples
from reference_cases import (
    EXACT,
    Case,
    PlainNumpy,
    Strict,
    assert_close,
    check_budget,
    check_forward,
    check_gradients,
    cotangents,
    fragile,
    run,
)
from strategies import cases

import pdcore


@examples(200)
@given(cases())
def test_numpy_equals_the_oracle(case: Case) -> None:
    out, lse = pdcore.attention(*case.qkv, case.spec, return_lse=True, **case.call)
    weights = pdcore.attention_weights(*case.qkv, case.spec, **case.call)
    assert out.dtype == lse.dtype == weights.dtype == np.float64
    check_forward(case, out, lse, weights)


@examples(100)
@given(cases())
def test_array_backend_equals_the_oracle(case: Case) -> None:
    with np.errstate(all="ignore"):  # array-api-strict is NumPy underneath, and warns
        out, lse = run(Strict(), case, array_api_strict.asarray)
        weights = Strict().attention_weights(case.plan(), case.inputs(array_api_strict.asarray))
    assert all(isinstance(x, array_api_strict._array_object.Array) for x in (out, lse, weights))
    check_forward(case, out, lse, weights)


@examples(60)
@given(cases())
def test_array_backend_gives_the_same_in_float32(case: Case) -> None:
    low = case.cast(np.float32)
    with np.errstate(all="ignore"):
        out, lse = run(Strict(), low, array_api_strict.asarray)
        again, level = run(PlainNumpy(), low)
    assert str(out.dtype) == str(lse.dtype) == "array_api_strict.float32"
    assert again.dtype == level.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(out), again)
    np.testing.assert_array_equal(np.asarray(lse), level)


@examples(120)
@given(cases(smallest=1, largest=7), st.integers(0, 2**16))
def test_numpy_gradients_are_central_differences(case: Case, seed: int) -> None:
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    check_forward(case, out, lse)
    assume(not fragile(case).any())
    d_out, d_lse = cotangents(case, lse, seed)
    assume(check_gradients(case, vjp(d_out, d_lse), d_out, d_lse, seed))


@examples(60)
@given(cases(smallest=1, largest=7), st.integers(0, 2**16))
def test_array_backend_gradients_are_central_differences(case: Case, seed: int) -> None:
    xp = array_api_strict
    assume(not fragile(case).any())
    with np.errstate(all="ignore"):
        out, lse, vjp = Strict().attention_vjp(case.plan(), case.inputs(xp.asarray))
        check_forward(case, out, lse)
        d_out, d_lse = cotangents(case, lse, seed)
        gradients = vjp(xp.asarray(d_out), xp.asarray(d_lse))
    assume(check_gradients(case, gradients, d_out, d_lse, seed))


@examples(80)
@given(cases(smallest=1, largest=7), st.integers(0, 2**16))
def test_the_pullback_is_linear_and_repeatable(case: Case, seed: int) -> None:
    _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    assume(not fragile(case).any())
    d_out, d_lse = cotangents(case, lse, seed)
    both = vjp(d_out, d_lse)
    alone, rest = vjp(d_out), vjp(np.zeros_like(d_out), d_lse)
    # A gradient that is 0 by cancellation is as exact as those that it is computed from.
    scale = sum(np.max(np.abs(x), initial=0.0) for g in (alone, rest) for x in g.values())
    for name, x in both.items():
        np.testing.assert_array_equal(vjp(d_out, d_lse)[name], x, err_msg=name)
        assert_close(x, alone[name] + rest[name], scale, EXACT, name)


@examples(100)
@given(cases(smallest=4, largest=16, dense=True))
def test_numpy_float32_is_within_the_budget(case: Case) -> None:
    low = case.cast(np.float32)
    assume(not fragile(case).any())
    out, lse = pdcore.attention(*low.qkv, low.spec, return_lse=True, **low.call)
    check_budget(low, out, lse)
