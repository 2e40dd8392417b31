"""Attention-BN without division by the CuPy backend's kernels, on the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("ml_dtypes")

from emulated_checks import check_budgets, fused
from emulated_cupy import NAME, EmulatedBackend, register
from recentre_laws import (  # noqa: F401 - collected here too
    test_a_nan_of_one_sequence_stays_there_under_the_gaussian_kernel,
    test_a_variance_that_overflows_is_not_computed,
    test_it_grows_with_prefix_statistics,
    test_it_is_plain_attention_of_other_queries,
    test_it_is_the_division_by_one,
    test_the_gaussian_kernel_does_not_see_it,
)
from reference_cases import Case, normal_case

from pdcore.plugins import registry as plugins
from pdcore_backends.cupy.query_fold import FoldedLoad
from pdcore_backends.cupy.tensor_cores import TensorCores
from pdcore_conformance.judge.budget import expect
from pdcore_conformance.judge.calls import dtype_of


@pytest.fixture(scope="module")
def name() -> Iterator[str]:
    register()
    yield NAME
    plugins.unregister_backend(NAME)


def far(spec: str, dtype: str) -> Case:
    """Draw keys of mean 100, and queries near them."""
    case = normal_case(spec, n=20, m=40, d=32, dv=32)
    return replace(case, q=100 + case.q, k=100 + case.k).cast(dtype_of(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spec", ["bn(with_std=false)", "bn(beta=0.9,with_std=false)+sh(1,2)"])
def test_the_query_load_recentres_with_the_constant_of_its_rows(spec: str, dtype: str) -> None:
    backend, case = EmulatedBackend(), far(spec, dtype)
    plan = fused(backend, case, TensorCores)
    assert isinstance(plan.transforms[0].choice, FoldedLoad)
    out, lse = backend.attention(plan, case.inputs(), lse=True)
    check_budgets(case, {"out": out, "lse": lse}, expect(*case.qkv, case.spec, **case.call))
    # A rounding error of a query meets k - beta mu, not k.
    atol = 0.01 if "beta" not in spec else 0.5
    np.testing.assert_allclose(lse, case.cast(np.float64).reference()[1], rtol=0, atol=atol)


@pytest.mark.parametrize("statistics", ["running", "prefix"])
def test_other_rows_are_recentred_before_the_kernel(statistics: str) -> None:
    backend = EmulatedBackend()
    case = far(f"bn(statistics={statistics},with_std=false)", "bfloat16")
    if statistics == "running":
        mean = case.k.astype(float).mean((0, 2)).astype(case.k.dtype)
        case = replace(case, call={**case.call, "params": {"mean": mean}})
    plan = fused(backend, case, TensorCores)
    assert plan.transforms[0].choice is None
    out, lse = backend.attention(plan, case.inputs(), lse=True)
    check_budgets(case, {"out": out, "lse": lse}, expect(*case.qkv, case.spec, **case.call))
