"""Decoding by layers of Flax with carried state: the rows of one call."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from pdcore import UnsupportedError
from pdcore_adapters.flax import DecoderAttention, SpecAttention, attention_fn

B, N, E, H = 2, 9, 16, 4
X = jax.random.normal(jax.random.key(0), (B, N, E))
SPECS = (
    "softmax",
    "causal+linear",
    "causal+bn(statistics=prefix)+sh(half=2)",
    "sparse(3,0)",
    "causal+alibi",
    "causal+bn(statistics=running,beta=param)",
    "causal+linear+h(sum)+conv1d(padding=causal)",
)


def layer_of(spec: str, key_heads: int = H, **options: Any) -> DecoderAttention:
    if "param" in spec or "running" in spec or "conv1d" in spec:
        attend: Any = SpecAttention(spec, key_heads, E // H, query_heads=H)
        for name in ("running_mean", "running_var", "spec_beta", "spec_weight"):
            if hasattr(attend, name):
                array = getattr(attend, name)
                array[...] += 0.1 * jnp.arange(array[...].size).reshape(array[...].shape)
    else:
        attend = attention_fn(spec)
    options = {"num_kv_heads": key_heads, "decode": False, "rngs": nnx.Rngs(0)} | options
    layer = DecoderAttention(H, E, attention_fn=attend, **options)
    layer.eval()
    return layer


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("key_heads", [H, 2])
def test_steps_give_the_rows_of_one_call(spec: str, key_heads: int) -> None:
    layer = layer_of(spec, key_heads, normalize_qk=True)
    whole = layer(X, is_causal=spec == "softmax")
    layer.init_cache((B, N, E))
    count = 0

    @nnx.jit
    def step(layer: Any, x: Any) -> Any:
        nonlocal count
        count += 1
        return layer(x, decode=True)

    rows = [step(layer, X[:, :4])]
    rows += [step(layer, X[:, i : i + 1]) for i in range(4, N)]
    close(jnp.concatenate(rows, axis=1), whole)
    assert count == 2  # a program for the prompt, and one for all steps
    assert jnp.isnan(step(layer, X[:, :1])).all()  # beyond the capacity


@pytest.mark.parametrize("spec", ["softmax", "causal+bn(statistics=prefix)+sh(half=2)"])
def test_prompts_have_padding_on_either_side(spec: str) -> None:
    layer = layer_of(spec, decode=True)
    layer.init_cache((B, N, E))
    real = np.arange(6) >= np.array([[0], [2]])
    prompt = jnp.where(real[..., None], X[:, :6], jnp.nan)
    first = layer(prompt, lengths=jnp.asarray(real))
    last = layer(X[:, 6:9], lengths=jnp.asarray([3, 1]))
    for b, (start, stop) in enumerate(((0, 9), (2, 7))):
        whole = layer(X[b : b + 1, start:stop], decode=False, is_causal=spec == "softmax")[0]
        close(first[b, start:], whole[: 6 - start])
        close(last[b, : stop - 6], whole[6 - start :])
    assert [*layer.carried["lengths"][...]] == [9, 5]


def test_the_state_is_part_of_the_module() -> None:
    layer = layer_of("causal+linear", decode=True)
    layer.init_cache((B, N, E))
    before = nnx.clone(layer)
    layer(X[:, :3])
    for module, expected in ((layer, 3), (before, 0)):
        state = nnx.state(module, nnx.Cache)["carried"]["lengths"][...]
        assert [*state] == [expected] * B


def test_what_decoding_does_not_do_is_refused() -> None:
    with pytest.raises(TypeError, match="attention_fn: got <function dot_product_attention"):
        DecoderAttention(H, E, decode=False, rngs=nnx.Rngs(0))
    layer = layer_of("bn", decode=True, dropout_rate=0.5)
    with pytest.raises(UnsupportedError, match="decode: bn is computed from keys"):
        layer.init_cache((B, N, E))
    layer = layer_of("causal", decode=True, dropout_rate=0.5)
    with pytest.raises(ValueError, match="call init_cache first"):
        layer(X)
    layer.init_cache((B, N, E))
    for options, message in (
        ({"mask": jnp.ones((1, 1, N, N))}, "mask: got it with decode=True; .*lengths="),
        ({"sow_weights": True}, "sow_weights: got it with decode=True"),
        ({"deterministic": False}, "dropout_rate: got 0.5 with decode=True"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            layer(X, **options)
    with pytest.raises(ValueError, match="lengths: got an array without decode=True"):
        layer(X, decode=False, lengths=jnp.ones(B, jnp.int32))
