"""Dropout on JAX: the laws, traced seeds, and one program for all seeds."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dropout_laws import DropoutLaws

import pdcore


class TestOnJax(DropoutLaws):
    xp, words = jnp, "uint32"

    def array(self, x):
        return jnp.asarray(x)

    def seeds(self, seed):
        return [jnp.uint32(seed), jnp.asarray([seed, 0], jnp.uint32)]


def test_one_program_serves_all_seeds():
    x = jax.random.normal(jax.random.key(0), (1, 2, 40, 8))
    count = 0

    @jax.jit
    def run(x, seed):
        nonlocal count
        count += 1
        return pdcore.attention(x, x, x, "bn", dropout=0.5, seed=seed)

    outs = [run(x, jnp.asarray(seed, jnp.uint32)) for seed in ([1, 0], [2, 0], [1, 1])]
    assert count == 1
    assert all((a != b).any() for a, b in pairwise(outs))
    expected = pdcore.attention(x, x, x, "bn", dropout=0.5, seed=2**32 + 1)
    np.testing.assert_allclose(outs[2], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ["softmax", "causal+alibi", "sh(1,2)"])
def test_gradients_of_any_order_drop_the_same(spec):
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 6, 4)).astype(np.float32)

    def loss(q, k, v):
        return (pdcore.attention(q, k, v, spec, dropout=0.4, seed=5) ** 2).sum()

    arrays = [jnp.asarray(x) for x in (q, k, v)]
    grads = jax.grad(loss, (0, 1, 2))(*arrays)
    out, _, vjp = pdcore.attention_vjp(q, k, v, spec, dropout=0.4, seed=5, backend="numpy")
    for name, x in zip("qkv", grads, strict=True):
        np.testing.assert_allclose(x, vjp(2 * out)[name], rtol=1e-4, atol=1e-5)
    along = jax.jvp(jax.grad(loss), arrays, [jnp.ones_like(x) for x in arrays])[1]
    step = 1e-3
    near = [jax.grad(loss)(*(x + s for x in arrays)) for s in (step, -step)]
    np.testing.assert_allclose(along, (near[0] - near[1]) / (2 * step), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("length", [5, 40, 300])
def test_compiled_calls_of_any_length_drop_the_same(length):
    x = np.random.default_rng(0).standard_normal((1, 2, length, 4)).astype(np.float32)
    run = jax.jit(lambda x, seed: pdcore.attention(x, x, x, "bn", dropout=0.4, seed=seed))
    out = run(x, jnp.asarray([7, 1], jnp.uint32))
    expected = pdcore.attention(x, x, x, "bn", dropout=0.4, seed=2**32 + 7, backend="numpy")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_a_key_of_another_kind_is_refused():
    x = jnp.zeros((1, 1, 2, 4))
    with pytest.raises(TypeError, match="seed: got dtype key"):
        pdcore.attention(x, x, x, dropout=0.5, seed=jax.random.key(0))
    with pytest.raises(ValueError, match="seed: got None with dropout"):
        pdcore.attention(x, x, x, dropout=0.5)
