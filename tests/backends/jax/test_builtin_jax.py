"""The built-in backend of JAX."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from builtin_checks import (  # noqa: F401 - collected here too
    test_a_row_whose_scores_overflow_is_right_or_no_number,
    test_both_ways_to_gradients_agree,
    test_eight_threads,
    test_every_dtype_is_within_its_budget,
    test_exchange_with_numpy,
    test_scores_that_overflow_below_are_not_left_out,
)

import pdcore
from pdcore.errors import UnsupportedError


@pytest.fixture
def name() -> str:
    return "jax"


@pytest.fixture(autouse=True)
def jax_settings() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


def test_jax_without_64_bits() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 2, 5, 4))
    with pytest.raises(UnsupportedError, match="float64 inputs: JAX has 64 bits only under"):
        pdcore.attention(*x, backend="jax")
    # Positions are then integers of 32 bits, and JAX warns of nothing.
    y = jax.numpy.asarray(x, dtype=jax.numpy.float32)
    want = pdcore.attention(*x, "causal+sh(1,2)", offset=np.asarray([1, 3]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = pdcore.attention(*y, "causal+sh(1,2)", offset=jax.numpy.asarray([1, 3]))
        pdcore.attention(
            *y, "linear+causal", offset="end", key_mask=jax.numpy.ones((2, 5), dtype=bool)
        )
    np.testing.assert_allclose(np.asarray(out), want, rtol=0, atol=1e-6)


def test_jax_products_are_marked_highest() -> None:
    x = jax.numpy.ones((3, 1, 2, 5, 4))
    layer = pdcore.bind("bn")

    def loss(x: Any) -> Any:
        return layer(*x).sum()

    for function in (loss, jax.grad(loss)):
        text = str(jax.make_jaxpr(function)(x))
        assert text.count("dot_general[") >= 2
        assert text.count("Precision.HIGHEST, Precision.HIGHEST") == text.count("dot_general[")
    pull = str(jax.make_jaxpr(lambda x: pdcore.attention_vjp(*x, "bn")[2](x[0])["q"])(x))
    assert pull.count("Precision.HIGHEST, Precision.HIGHEST") == pull.count("dot_general[") > 0


def test_jax_compiles_once_for_each_shape() -> None:
    from pdcore_backends.jax import local

    x = jax.numpy.ones((3, 1, 2, 5, 4))
    local._attention.clear_cache()
    for _ in range(3):
        pdcore.attention(*x, "causal")
        pdcore.attention(*x, "causal", offset=jax.numpy.asarray(2))
    assert local._attention._cache_size() == 2
    for offset in range(3):
        pdcore.attention(*x, "causal", offset=jax.numpy.asarray(offset))
    assert local._attention._cache_size() == 2
    pdcore.attention(*x, "causal", offset=1)  # a Python int decides which blocks are skipped
    assert local._attention._cache_size() == 3


def test_jax_devices() -> None:
    x = jax.numpy.ones((3, 1, 2, 5, 4))
    with pytest.raises(UnsupportedError, match=r"device cpu:9: JAX has devices \[0\] of cpu"):
        pdcore.attention(*x, backend="jax:cpu:9")
    if jax.default_backend() == "cpu":
        with pytest.raises(UnsupportedError, match=r"device cuda: .*cuda"):
            pdcore.attention(*x, backend="jax:cuda")
