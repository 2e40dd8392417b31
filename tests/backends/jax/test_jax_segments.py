"""Packed sequences on JAX: the laws, padded programs, and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segment_laws import IDS, Q, check_forward, check_gradients

import pdcore


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("spec", "call"),
    [
        ("causal+bn(statistics=prefix)", "end"),
        ("sh(2,3)+bn(statistics=batch)", "key_mask"),
        pytest.param("causal+linear", "plain", marks=pytest.mark.nightly),
    ],
)
def test_results_are_those_of_the_oracle(spec, call):
    check_forward("jax", spec, call, jnp.asarray)


def test_gradients_are_those_of_separate_calls():
    check_gradients("jax", "bn", jnp.asarray)


def test_gradient_and_jit_with_ids_from_outside():
    x = jnp.asarray(np.nan_to_num(Q, nan=0.3))

    def loss(q):
        return (pdcore.attention(q, q, q, "bn", segments=IDS) * x).sum()

    want = pdcore.attention_vjp(x, x, x, "bn", segments=IDS)[2](x)
    total = want["q"] + want["k"] + want["v"]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), total, rtol=1e-9, atol=1e-11)
