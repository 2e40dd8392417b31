"""Test the oracle on JAX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from oracle_checks import (  # noqa: F401 - collected here too
    Framework,
    Slopes,
    arguments,
    call,
    loss,
    test_a_constant_feature,
    test_a_row_whose_kernel_values_are_all_zero_has_zero_gradient,
    test_empty,
    test_empty_rows_have_zero_gradient_and_padding_has_none,
    test_large_inputs_have_finite_gradients,
    test_numbers_are_those_of_numpy_and_gradients_true,
    test_plain_calls_with_grouped_heads,
    test_where_kappa_or_its_logarithm_bends,
)

from pdcore.reference import reference_attention
from pdcore.spec import AttentionSpec


@pytest.fixture
def framework() -> Iterator[Framework]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax_framework()
    jax.config.update("jax_enable_x64", before)


def jax_framework() -> Framework:
    jnp = jax.numpy

    def slopes(spec: str | AttentionSpec) -> Slopes:
        def function(smooth: Mapping[str, Any], fixed: Mapping[str, Any]) -> Any:
            out, lse = call(spec, smooth, fixed, return_lse=True)
            return loss(out, lse, jnp.where, jnp.isfinite, jnp.asarray), (out, lse)

        # Traced as a whole with little optimisation, because compiling takes most of the time.
        traced = jax.jit(
            jax.value_and_grad(function, has_aux=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )

        def numbers(smooth: Mapping[str, Any], fixed: Mapping[str, Any]) -> Any:
            (_, (out, lse)), gradients = traced(dict(smooth), dict(fixed))
            return np.asarray(out), np.asarray(lse), jax.tree.map(np.asarray, gradients)

        return numbers

    return Framework(jnp.asarray, slopes)


def test_jax_16_bit_without_64_bit_integers() -> None:
    smooth, _ = arguments("linear")
    arrays = {name: jax.numpy.asarray(x, dtype=jax.numpy.bfloat16) for name, x in smooth.items()}
    for offset in (jax.numpy.asarray([1, 2]), "end"):
        function = jax.jit(
            lambda x, offset=offset: call(
                "causal+sh(1,2)",
                x,
                {"offset": offset},
                return_lse=True,
                round_intermediates=jax.numpy.bfloat16,
            )
        )
        out, lse = function(arrays)
        assert out.dtype == jax.numpy.bfloat16
        assert lse.dtype == jax.numpy.float32


def test_jax_vmap() -> None:
    smooth, _ = arguments("linear")
    arrays = [jax.numpy.asarray(smooth[name]) for name in "qkv"]
    spec = "bn+sh(1,2)+h(count)"
    got = jax.jit(jax.vmap(lambda q, k, v: reference_attention(q, k, v, spec)))(*arrays)
    expected = jax.jit(lambda q, k, v: reference_attention(q, k, v, spec))(*arrays)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
