"""A support vector expansion as attention on the frameworks, against the solver's prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdcore.plugins import registry as plugins
from pdcore.svr import SupportVectorExpansion, fit

SPECS = [
    "softmax",
    "gaussian(gamma=0.1)+h(count)",
    "cosine+h(one)",
    "polynomial",
    "linear",
    "relu",
    "random_features(count=16)",
    "bn",
    "linear+bn",
    "sh(1,3)",
    "bn+sh(2,1)",
    "sparse(0,0)",
]


def fitted(spec: str) -> tuple[SupportVectorExpansion, Any, Any]:
    """Fit two heads; return queries of four heads, and the solver's prediction."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    keys, targets = rng.standard_normal((2, 25, 4)), rng.standard_normal((2, 25, 3))
    q = rng.standard_normal((4, 9, 4))
    first = fit(keys, targets, spec, C=1.0, epsilon=0.1, solver="sklearn")
    C = 5.0 / float(np.mean(np.diag(first.heads[0].kernel.gram)))
    expansion = fit(keys, targets, spec, C=C, epsilon=0.1, solver="sklearn")
    return expansion, q, expansion.predict(q)


@pytest.mark.torch
@pytest.mark.parametrize("spec", SPECS)
def test_torch(spec: str) -> None:
    torch = pytest.importorskip("torch")
    expansion, q, wanted = fitted(spec)
    found = expansion.attention(torch.as_tensor(q))
    assert found.dtype == torch.float64
    assert np.max(np.abs(found.numpy() - wanted)) < 1e-10 * np.max(np.abs(wanted))
    # By a backend of another library, to which the NumPy arrays are converted.
    there = expansion.attention(q, backend="torch")
    assert type(there) is np.ndarray
    assert np.max(np.abs(there - wanted)) < 1e-10 * np.max(np.abs(wanted))


@pytest.mark.jax
@pytest.mark.parametrize("spec", SPECS)
def test_jax(spec: str, wide: None) -> None:
    jax: Any = pytest.importorskip("jax")
    expansion, q, wanted = fitted(spec)
    found = expansion.attention(jax.numpy.asarray(q))
    assert found.dtype == jax.numpy.float64
    assert np.max(np.abs(np.asarray(found) - wanted)) < 1e-10 * np.max(np.abs(wanted))


@pytest.mark.cuda
@pytest.mark.parametrize("spec", [s for s in SPECS if "linear" not in s and "relu" not in s])
def test_cuda_kernels(spec: str) -> None:
    pytest.importorskip("cuda_on_cpu")
    from emulated_cupy import NAME, register

    expansion, q, wanted = fitted(spec)
    register()
    try:
        found = expansion.attention(q, backend=NAME)
    finally:
        plugins.unregister_backend(NAME)
    assert np.max(np.abs(found - wanted)) < 1e-10 * np.max(np.abs(wanted))
