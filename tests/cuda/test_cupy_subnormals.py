"""Subnormal numbers in the CUDA kernels, which CuPy compiles with ``-ftz=true``, on the emulator.

Float32 and bfloat16 numbers below 1.2e-38 count as 0, in inputs and in results. So the oracle of a
call is that of the same call with zeros in their place. float16 has subnormal numbers of its own,
which float32 holds as normal ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cuda_on_cpu
import emulated_cupy
import numpy as np
import pytest
from emulated_checks import check_budgets, fused
from emulated_cupy import EmulatedBackend
from reference_cases import Case, cotangents, normal_case

from pdcore_backends.cupy.cubins import FLAGS as OPTIONS
from pdcore_backends.cupy.features import CompiledFeatures
from pdcore_backends.cupy.scores import Compiled
from pdcore_backends.cupy.tensor_cores import TensorCores
from pdcore_conformance.judge.budget import expect
from pdcore_conformance.judge.calls import dtype_of

TINY = {"float32": 1e-39, "bfloat16": 1e-39, "float16": 1e-6}
SMALLEST = float(np.finfo(np.float32).tiny)

# A program is compiled for each call, which takes seconds.
pytestmark = pytest.mark.sampled(6)


@pytest.fixture(scope="module")
def backend() -> EmulatedBackend:
    """Return one backend for all tests, because it caches compiled kernels."""
    return EmulatedBackend()


def scattered(x: Any, seed: int, size: float) -> Any:
    """Return an array whose entries are subnormal, one of three."""
    chosen = np.random.default_rng(seed).random(x.shape) < 1 / 3
    return np.where(chosen, (x * size).astype(x.dtype), x)


def flushed(x: Any) -> Any:
    return np.where(np.abs(x.astype(np.float64)) < SMALLEST, np.zeros_like(x), x)


def drawn(spec: str, dtype: str, *, whole: bool, **shape: int) -> Case:
    """Draw a call with subnormal numbers; `whole`: all numbers of a query, a key, and the values.

    Otherwise no row of queries or keys has subnormal numbers only.
    """
    size = TINY[dtype]
    case = normal_case(spec, dtype=dtype_of(dtype), **shape)
    q, k, v = (scattered(x, i, size) for i, x in enumerate(case.qkv))
    if not whole:
        q[..., 0] = k[..., 0] = 1
    else:
        q[..., 1, :], k[..., 2, :], v[0, 0] = (
            (x * size).astype(x.dtype) for x in (case.q[..., 1, :], case.k[..., 2, :], case.v[0, 0])
        )
    return replace(case, q=q, k=k, v=v)


def check(backend: EmulatedBackend, case: Case, kind: Any = Compiled | CompiledFeatures) -> None:
    """Assert that out, lse and all gradients are those of the call without subnormal numbers."""
    forward = fused(backend, case, kind)
    out, lse = backend.attention(forward, case.inputs(), lse=True)
    d_out, d_lse = (x.astype(case.q.dtype) for x in cotangents(case, lse))
    d_out = scattered(d_out, 3, TINY[str(case.q.dtype)])
    zeros = (flushed(x) for x in case.qkv)
    expected = expect(*zeros, case.spec, **case.call, d_out=flushed(d_out), d_lse=d_lse)
    check_budgets(case, {"out": out, "lse": lse}, expected)
    out, lse, vjp = backend.attention_vjp(fused(backend, case, kind, vjp=True), case.inputs())
    results = {"out": out, "lse": lse}
    results |= {f"d_{name}": x for name, x in vjp(d_out, d_lse).items()}
    check_budgets(case, {name: results[name] for name in expected.oracle}, expected)


@pytest.mark.parametrize(
    ("spec", "whole"),
    [
        ("softmax", True),
        ("causal", True),
        ("bn", True),
        ("bn(statistics=prefix)+causal", True),
        ("bn+sh(1,2)", True),
        ("polynomial", True),
        ("gaussian(0.5)", True),
        ("cosine(2.0)", False),  # array operations divide by the norm of a row
        ("linear", True),
        ("linear+causal", True),
        ("relu", False),  # array operations divide by the largest feature of a row
        ("random_features(6)", True),
    ],
)
def test_subnormal_numbers_count_as_zeros(backend: EmulatedBackend, spec: str, whole: bool) -> None:
    check(backend, drawn(spec, "float32", whole=whole, n=70, m=67, d=6, dv=5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("spec", ["softmax", "bn", "polynomial", "linear"])
def test_subnormal_numbers_of_16_bits(backend: EmulatedBackend, spec: str, dtype: str) -> None:
    case = drawn(spec, dtype, whole=True, n=34, m=67, d=8, dv=8)
    check(backend, case)


@pytest.mark.parametrize("spec", ["softmax", "bn"])
def test_subnormal_numbers_on_tensor_cores(backend: EmulatedBackend, spec: str) -> None:
    check(backend, drawn(spec, "bfloat16", whole=True, n=34, m=67, d=32, dv=32), TensorCores)


@pytest.mark.parametrize("spec", ["softmax", "bn", "random_features(6)"])
def test_weights_that_underflow(backend: EmulatedBackend, spec: str) -> None:
    # Weights below 1e-38 of the largest one, of which some are subnormal.
    case = normal_case(spec, n=66, m=70, d=6, dtype=np.float32, sd=6.0)
    scores = np.einsum("bhid,bhjd->bhij", case.q[:, ::2], case.k) / np.sqrt(6)
    if spec == "softmax":
        gaps = scores.max(-1, keepdims=True) - scores
        assert ((gaps > 87.4) & (gaps < 103)).any()
    check(backend, case)


def test_values_that_are_subnormal_give_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn("softmax", "float32", whole=True)
    for options, kept in ((OPTIONS, False), (("-std=c++17",), True)):
        monkeypatch.setattr(emulated_cupy, "OPTIONS", options)
        backend = EmulatedBackend()
        out, _ = backend.attention(fused(backend, case), case.inputs())
        assert (out[0, :2] != 0).all() == kept
        assert not kept or abs(out[0, :2]).max() < SMALLEST
    assert cuda_on_cpu.build.flushes(OPTIONS)
