"""The example's backend, which needs Numba and the example installed."""

from __future__ import annotations

import importlib.metadata

import numba  # noqa: F401 - or these tests show nothing
import numpy as np
import pytest
from installing import rediscovered

import pdcore
from pdcore.plugins import registry as plugins


@pytest.fixture
def example(monkeypatch):
    """Have the example distribution that is installed."""
    importlib.metadata.distribution("pdcore-example")
    with rediscovered(monkeypatch):
        assert "numba" in plugins.registered(), plugins.broken.get("example")
        yield


@pytest.fixture
def compiled(example):
    """The backend, compiled."""
    return plugins.load_backend("numba")


def covered(monkeypatch, backend):
    """Count the calls that the compiled code runs."""
    import pdcore_example.backend as module

    calls = []
    run = module.attend
    monkeypatch.setattr(module, "attend", lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.mark.parametrize(
    ("spec", "times"),
    [
        ("softmax", 1),
        ("bn+sh(1,2)", 2),
        ("causal", 1),
        ("sparse(3,2)", 1),
        ("gaussian(gamma=0.3)", 1),
        ("cosine", 1),
        ("linear", 0),
        ("polynomial", 0),
        ("softmax(softcap=2)", 0),
    ],
)
def test_compiled_code_runs_what_it_was_written_for(compiled, monkeypatch, spec, times):
    calls = covered(monkeypatch, compiled)
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 2, 70, 8), dtype=np.float32)
    out, lse = pdcore.attention(q, k, v, spec, backend="numba", return_lse=True)
    expected, level = pdcore.attention(q, k, v, spec, backend="numpy", return_lse=True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse, level, rtol=1e-4, atol=1e-4)
    assert len(calls) == times


def test_exp_is_close_and_keeps_what_is_special(compiled):
    from numba import njit
    from pdcore_example import fused

    exp = fused.exp

    @njit
    def each(x):
        return np.array([exp(entry) for entry in x])

    x = -np.geomspace(1e-8, 86.9, 20001).astype(np.float32)
    wanted = np.exp(x.astype(np.float64))
    assert np.max(np.abs(each(x) / wanted - 1)) < 3 * np.finfo(np.float32).eps
    special = each(np.array([0.0, -88.0, -np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(special, [1.0, 0.0, 0.0, np.nan])


def test_a_nan_key_reaches_its_rows(compiled):
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 1, 300, 8), dtype=np.float32)
    k[..., 5, :] = np.nan
    out = pdcore.attention(q, k, v, "causal", backend="numba")
    assert np.isnan(out[..., 5:, :]).all()
