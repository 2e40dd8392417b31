"""Calls under JAX's own checks, which make implicit broadcasts and casts errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdcore

SPECS = (
    "softmax+causal",
    "softmax+sparse(2,1)",
    "softmax+sh(1,2)",
    "causal+bn(statistics=prefix)",
    "iebn",
    "conv1d",
    "linear+causal",
    "random_features(4)+causal",
)
CHECKS: dict[str, Any] = {
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "dtype": lambda: jax.numpy_dtype_promotion("strict"),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_call_and_its_gradient_pass_the_checks(spec: str, check: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(x, "float32") for x in rng.standard_normal((3, 1, 2, 6, 4)))
    sizes: dict[Any, int] = {"H": 2, "D": 4}
    params = {
        p.name: jnp.ones(tuple(sizes.get(n, n) for n in p.shapes[-1]), "float32")
        for p in pdcore.parse(spec).parameters()
    }

    def loss(q: Any) -> Any:
        return jnp.sum(pdcore.attention(q, k, v, spec, params=params))

    with CHECKS[check]():
        gradient = jax.grad(loss)(q)
    np.testing.assert_array_equal(gradient, jax.grad(loss)(q))
