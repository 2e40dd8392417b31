"""Tests of every built-in backend; a module of tests has a fixture ``name`` and imports them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from nightly import NIGHTLY
from reference_cases import Case, cotangents, mapped, normal_case

import pdcore
from pdcore.dispatch import FLOATS
from pdcore.plugins import registry as plugins
from pdcore_conformance.frameworks import framework
from pdcore_conformance.judge.budget import expect, judge
from pdcore_conformance.judge.calls import Call, drawn
from pdcore_conformance.judge.overflow import expect_nearby, overflow_excused

SPECS = (
    "softmax(softcap=2)+causal",
    "gaussian(gamma=0.3)+h(count)",
    "linear+causal",
    "bn",
    "causal+bn(statistics=prefix,eps=0.1)",
    "bn(beta=param,eps=0.1)+sh(1,2)",
    "random_features(6,1)+bn",
    "cosine(scale=2)+sparse(2,1)",
)


# --- numbers --------------------------------------------------------------------------------------


def calls(text: str, dtype: Any) -> Iterator[Case]:
    case = normal_case(text, n=20, m=23, d=4, dtype=dtype)
    yield case
    real = np.random.default_rng(1).random((2, 23)) < 0.8
    yield replace(case, call={**case.call, "key_mask": real, "offset": np.asarray([2, -1])})


def dtypes(name: str) -> list[str]:
    info = plugins.registered()[name]
    # What takes the time on JAX is compiling; the conformance suite has all of them.
    some = FLOATS if name != "jax" else ("float32", "bfloat16") if NIGHTLY else ("bfloat16",)
    return [dtype for dtype in some if info.support(dtype) == "full"]


@pytest.mark.parametrize("text", SPECS)
def test_every_dtype_is_within_its_budget(name: str, text: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    library = framework(plugins.registered()[name].library)
    for dtype in dtypes(name):
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        with library.precision(dtype):
            for case in calls(text, np.dtype(kind)):
                q, k, v = map(library.asarray, case.qkv)
                out, lse = pdcore.attention(
                    q, k, v, case.spec, **mapped(case.call, library.asarray), return_lse=True
                )
                assert library.dtype_of(out) == dtype
                found = {"out": library.asnumpy(out), "lse": library.asnumpy(lse)}
                for verdict in judge(found, expect(*case.qkv, case.spec, **case.call)).values():
                    assert verdict.ok, f"{case} {dtype}: {verdict}"


def test_a_row_whose_scores_overflow_is_right_or_no_number(name: str) -> None:
    library = framework(plugins.registered()[name].library)
    small = Call(keys=5, mask="empty", draw="largest")
    others = (Call(spec=s, draw=d) for s in ("softmax", "causal") for d in ("vast", "largest"))
    for call in (small, *others):
        arrays, expected = drawn(call), expect_nearby(call)
        with library.precision(call.dtype):
            q, k, v = (library.asarray(x) for x in (arrays.q, arrays.k, arrays.v))
            options = mapped(arrays.options, library.asarray)
            out, lse = pdcore.attention(q, k, v, call.spec, return_lse=True, **options)
        found = {"out": library.asnumpy(out), "lse": library.asnumpy(lse)}
        for verdict in judge(overflow_excused(found, expected), expected).values():
            assert verdict.ok, f"{call.label}: {verdict}"


@pytest.mark.parametrize("dim", [3, 8, 40])
def test_scores_that_overflow_below_are_not_left_out(name: str, dim: int) -> None:
    library = framework(plugins.registered()[name].library)
    v = np.asarray([[[[0.0], [1.0]]]], dtype="float32")
    far = np.full((1, 1, 1, dim), 1e20, dtype="float32")
    # The product with the first key is -1e38, the larger of the two, and its first terms are -4e38.
    q, k = (np.zeros((1, 1, rows, dim), dtype="float32") for rows in (1, 2))
    q[..., :3] = 1e19
    k[..., :3] = [[-2e19, -2e19, 3e19], [-5e18, -5e18, -5e18]]
    for right, queries, keys in (
        (None, far, np.concatenate([-far, -2 * far], axis=-2)),  # every score is -inf
        (0.0, q, k),
    ):
        out = pdcore.attention(*map(library.asarray, (queries, keys, v)))
        [value] = library.asnumpy(out).ravel()
        assert np.isnan(value) or value == right, value


def test_both_ways_to_gradients_agree(name: str) -> None:
    library = framework(plugins.registered()[name].library)
    for text in ("bn", "causal+bn(statistics=prefix,eps=0.1)", "linear+causal"):
        case = normal_case(text, n=9, m=11)
        with library.precision("float64"):
            arrays = dict(zip("qkv", map(library.asarray, case.qkv), strict=True))
            d = tuple(map(library.asarray, cotangents(case, case.reference()[1])))
            _, _, vjp = pdcore.attention_vjp(*arrays.values(), case.spec)
            want = pdcore.attention_vjp(*case.qkv, case.spec)[2](*map(library.asnumpy, d))
            ways = [vjp(*d)]
            if library.has_autodiff:

                def function(x: Any, spec: Any = case.spec) -> Any:
                    return pdcore.attention(x["q"], x["k"], x["v"], spec, return_lse=True)

                ways.append(library.vjp(function, arrays, d)[1])
            for gradients in ways:
                for n, x in want.items():
                    np.testing.assert_allclose(
                        library.asnumpy(gradients[n]), x, rtol=0, atol=1e-11 * np.max(np.abs(x))
                    )


def test_exchange_with_numpy(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 4), dtype=np.float32)
    want = pdcore.attention(*x, "bn")
    for choice in (name, f"{name}:cpu"):
        out = pdcore.attention(*x, "bn", backend=choice)
        assert type(out) is np.ndarray
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-6)
    library = framework(plugins.registered()[name].library)
    with library.precision("float32"):
        back = pdcore.attention(*map(library.asarray, x), "bn", backend="numpy", device="cpu")
        assert library.is_array(back)
        np.testing.assert_allclose(library.asnumpy(back), want, rtol=0, atol=1e-6)


def test_eight_threads(name: str) -> None:
    library = framework(plugins.registered()[name].library)
    with library.precision("float32"):
        cases = [
            normal_case(text, seed=i, n=30, m=29, d=4, dtype=np.float32)
            for i, text in enumerate(SPECS[:4])
        ]
        given = [tuple(map(library.asarray, case.qkv)) for case in cases]
        backend = plugins.load_backend(name)

        def run(index: int) -> Any:
            return pdcore.attention(*given[index], cases[index].spec)

        want = [library.asnumpy(run(i)) for i in range(4)]
        with ThreadPoolExecutor(8) as threads:
            for index, out in zip(
                range(64), threads.map(run, [i % 4 for i in range(64)]), strict=True
            ):
                np.testing.assert_allclose(library.asnumpy(out), want[index % 4], rtol=0, atol=1e-6)
        backend.synchronize()
        assert backend.versions()
