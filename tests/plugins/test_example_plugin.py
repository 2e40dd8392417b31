"""A third party's distribution, with a backend, a kernel and a normalization of its own."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
from installing import EXAMPLE, add_distribution, rediscovered

import pdcore
from pdcore.backend import FEATURES
from pdcore.plugins import registry as plugins
from pdcore.spec import vocabulary


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Provide the example distribution: the installed one, else its sources with metadata."""
    try:
        importlib.metadata.distribution("pdcore-example")
    except importlib.metadata.PackageNotFoundError:
        add_distribution(tmp_path, "pdcore-example", {"example": "pdcore_example"})
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLE)
    with rediscovered(monkeypatch):
        assert "numba" in plugins.registered(), plugins.broken.get("example")
        yield


def test_example_is_declared(example):
    assert plugins.registered()["numba"].library == "numpy"
    assert plugins.broken == {}
    assert vocabulary.find_kernel("sigmoid").__module__ == "pdcore_example.kernel"
    assert (
        str(pdcore.parse("key_rms + sigmoid(scale=2)+h(one)")) == "sigmoid(scale=2)+h(one)+key_rms"
    )
    assert set(plugins.registered()["numba"].capabilities) == set(FEATURES)


@pytest.fixture
def arrays(example):
    rng = np.random.default_rng(7)
    q, k, v = rng.standard_normal((3, 2, 2, 5, 4))
    params = {"shift": np.array([0.3, -0.7]), "gain": 1 + 0.3 * rng.standard_normal((2, 4))}
    return q, k, v, params


def strict(x):
    import array_api_strict

    return array_api_strict.asarray(x)


def literal(q, k, v, params, *, one):
    """Sigmoid attention over keys divided by their root mean square, written out."""
    square = np.mean(k * k, axis=-2, keepdims=True)

    def t(x):
        return params["gain"][:, None] * x / np.sqrt(square + 1e-6)

    s = t(q) @ np.swapaxes(t(k), -1, -2) / 2 + params["shift"][:, None, None]
    w = 1 / (1 + np.exp(-s))
    return (w if one else w / w.sum(-1, keepdims=True)) @ v


@pytest.mark.parametrize("one", [False, True], ids=["h(sum)", "h(one)"])
@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
def test_example_kernel_and_normalization(arrays, library, one):
    q, k, v, params = arrays
    spec = "sigmoid+key_rms" + ("+h(one)" if one else "")
    expected = literal(q, k, v, params, one=one)
    if library == "array_api_strict":
        q, k, v = strict(q), strict(k), strict(v)
        params = {name: strict(x) for name, x in params.items()}
    out = pdcore.attention(q, k, v, spec, params=params)
    assert type(out) is type(q)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["q", "k", "v", "shift", "gain"])
@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
def test_example_gradients(arrays, library, name):
    q, k, v, params = arrays
    rng = np.random.default_rng(11)
    d_out = rng.standard_normal(q.shape)
    bring = strict if library == "array_api_strict" else (lambda x: x)
    given = {"q": q, "k": k, "v": v, **params}

    def loss(x):
        point = {**given, name: x}
        parts = {n: point.pop(n) for n in ("q", "k", "v")}
        return float(np.sum(d_out * literal(**parts, params=point, one=False)))

    _, _, vjp = pdcore.attention_vjp(
        bring(q),
        bring(k),
        bring(v),
        "sigmoid+key_rms",
        params={n: bring(x) for n, x in params.items()},
    )
    direction = rng.standard_normal(given[name].shape)
    step = 1e-5
    slope = (loss(given[name] + step * direction) - loss(given[name] - step * direction)) / (
        2 * step
    )
    found = float(np.sum(np.asarray(vjp(bring(d_out))[name]) * direction))
    assert found == pytest.approx(slope, rel=1e-7, abs=1e-9)


def test_example_statistics_merge(example):
    from pdcore_example.normalization import MeanSquare

    keys = np.random.default_rng(3).standard_normal((2, 3, 9, 4))
    mask = np.arange(9)[:, None] % 4 != 1
    stats, xp = MeanSquare(), np
    parts = [stats.of(keys[..., a:b, :], mask[a:b], xp=xp) for a, b in ((0, 2), (2, 7), (7, 9))]
    state = stats.zero(parts[0], xp=xp)
    for part in parts:
        state = stats.merge(state, part, xp=xp)
    whole = stats.of(keys, mask, xp=xp)
    for key, value in stats.finalize(state, xp=xp).items():
        np.testing.assert_allclose(value, whole[key], rtol=1e-13)
