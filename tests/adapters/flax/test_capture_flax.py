"""Test what `capture` records of layers of Flax."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import numpy as jnp

import pdcore
from pdcore_adapters.diagnostics import capture
from pdcore_adapters.flax import LinenSpecAttention, SpecAttention, attention_fn

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 8)), jnp.float32)


class Model(nnx.Module):
    def __init__(self, spec="softmax"):
        rngs = nnx.Rngs(0)
        own = SpecAttention("bn(beta=param)", 2, 4)
        kinds = {"one": attention_fn(spec), "two": own, "three": nnx.dot_product_attention}
        for name, attend in kinds.items():
            layer = nnx.MultiHeadAttention(2, 8, attention_fn=attend, decode=False, rngs=rngs)
            setattr(self, name, layer)

    def __call__(self, x):
        return self.three(self.two(self.one(x)))


def test_nnx():
    model = Model()
    model.eval()
    with capture(model) as record:
        model(X)
    assert record.layers == ("one", "two.attention_fn")
    assert record.left == {"three": "its attention_fn is dot_product_attention, not pdcore's"}
    call = record.of("one")[0]
    q, k, v = call.inputs[:3]
    want = jax.nn.softmax(jnp.einsum("bhnd,bhmd->bhnm", q, k) / 2.0, axis=-1)
    np.testing.assert_allclose(call.weights(), want, rtol=1e-5)
    np.testing.assert_allclose(call.weights(slice(3, 5)), want[:, :, 3:5], rtol=1e-5)
    np.testing.assert_allclose(call.out, want @ v, rtol=1e-4, atol=1e-6)
    query = model.one.query(X)
    np.testing.assert_array_equal(q, query.swapaxes(1, 2))
    two = record.of("two.attention_fn")[0]
    assert "beta" in two.inputs.params
    maps = np.asarray(two.weights(), np.float64)
    distances = [np.linalg.norm(m[0] - m[1]) for m in maps]
    np.testing.assert_allclose(two.distances(rows=3).maps, distances, rtol=1e-5)


def test_linen():
    class Both(linen.Module):
        @linen.compact
        def __call__(self, x):
            for attend in (
                attention_fn("softmax"),
                LinenSpecAttention("bn(beta=param)"),
                linen.dot_product_attention,
            ):
                x = linen.MultiHeadDotProductAttention(2, attention_fn=attend)(x)
            return x

    model = Both()
    variables = model.init(jax.random.key(0), X)
    with capture(model) as record:
        model.apply(variables, X)
    assert len(record.layers) == 2
    assert record.layers[0] == "MultiHeadDotProductAttention_0"
    assert list(record.left) == ["MultiHeadDotProductAttention_2"]
    for call in record.calls:
        np.testing.assert_allclose(call.weights().sum(-1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(call.weights() @ call.inputs.v, call.out, rtol=1e-4, atol=1e-5)


def test_traced_calls_are_refused_by_name():
    model = Model()
    with (
        capture(model),
        pytest.raises(pdcore.UnsupportedError, match="the call of one is traced"),
    ):
        nnx.jit(lambda model, x: model(x))(model, X)
