"""Decoding by layers of Equinox with carried state: the rows of one call."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from pdcore import UnsupportedError
from pdcore_adapters.equinox import PDMultiheadAttention

B, N, E, H = 2, 9, 16, 4
X = jax.random.normal(jax.random.key(0), (B, N, E))


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "spec",
    [
        "causal",
        "causal+linear",
        "causal+bn(statistics=prefix,beta=param)+sh(half=2)",
        "causal+alibi",
        "causal+conv1d(padding=causal)",
    ],
)
def test_steps_give_the_rows_of_one_call(spec: str) -> None:
    layer = PDMultiheadAttention(H, E, spec=spec, vo_size=3, key=jax.random.key(0))
    layer = eqx.tree_at(
        lambda layer: layer.spec_params, layer, jax.tree.map(lambda x: 0.7 * x, layer.spec_params)
    )
    whole = jax.vmap(lambda x: layer(x, x, x))(X)
    count = 0

    @eqx.filter_jit
    def step(layer: Any, cache: Any, x: Any) -> Any:
        nonlocal count
        count += 1
        return jax.vmap(lambda cache, x: layer.extend(cache, x, x, x))(cache, x)

    cache = jax.vmap(lambda _: layer.init_cache(N))(jnp.arange(B))
    rows = []
    for start, stop in ((0, 4), *((i, i + 1) for i in range(4, N))):
        out, cache = step(layer, cache, X[:, start:stop])
        rows.append(out)
    close(jnp.concatenate(rows, axis=1), whole)
    assert count == 2  # a program for the prompt, and one for all steps
    assert jnp.isnan(step(layer, cache, X[:, :1])[0]).all()  # beyond the capacity


def test_gradients_go_through_steps() -> None:
    layer = PDMultiheadAttention(H, E, spec="causal+linear", key=jax.random.key(0))

    def by_steps(layer: Any, x: Any) -> Any:
        cache = layer.init_cache(None)
        _, rows = jax.lax.scan(lambda cache, x: layer.extend(cache, *[x[None]] * 3)[::-1], cache, x)
        return (rows**2).sum()

    got = eqx.filter_grad(by_steps)(layer, X[0])
    expected = eqx.filter_grad(lambda layer, x: (layer(x, x, x) ** 2).sum())(layer, X[0])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_running_statistics_are_those_of_the_state() -> None:
    make = eqx.nn.make_with_state(PDMultiheadAttention)
    layer, state = make(H, E, spec="causal+bn(statistics=running)", key=jax.random.key(0))
    _, state = layer(X[0], X[0], X[0], state=state)
    whole, _ = layer(X[1], X[1], X[1], state=state, inference=True)
    cache, rows = layer.init_cache(N, state=state), []
    for start, stop in ((0, 5), (5, 9)):
        x = X[1, start:stop]
        out, cache = layer.extend(cache, x, x, x, state=state)
        rows.append(out)
    close(jnp.concatenate(rows), whole)
    with pytest.raises(TypeError, match="state: got NoneType for"):
        layer.extend(cache, x, x, x)


def test_padding_and_heads_are_those_of_a_call() -> None:
    layer = PDMultiheadAttention(H, E, spec="causal", key=jax.random.key(0))
    places = jnp.arange(7)

    def turned(places: Any) -> Any:
        angle = jnp.cos(places)[:, None, None]
        return lambda q, k, v: (q * angle, k * angle, v)

    whole = layer(X[0, :7], X[0, :7], X[0, :7], process_heads=turned(places))
    cache = layer.init_cache(N)
    x = jnp.concatenate([jnp.full((2, E), jnp.nan), X[0, :5]])
    first, cache = layer.extend(
        cache, x, x, x, lengths=jnp.arange(7) >= 2, process_heads=turned(places - 2)
    )
    x = X[0, 5:9]
    last, cache = layer.extend(
        cache, x, x, x, lengths=jnp.asarray(2), process_heads=turned(jnp.arange(5, 9))
    )
    close(jnp.concatenate([first[2:], last[:2]]), whole)


def test_what_decoding_does_not_do_is_refused() -> None:
    key = jax.random.key(0)
    with pytest.raises(UnsupportedError, match="decode: bn is computed from keys"):
        PDMultiheadAttention(H, E, spec="bn", key=key).init_cache(N)
    layer = PDMultiheadAttention(H, E, spec="causal", dropout_p=0.5, key=key)
    cache, x = layer.init_cache(N), X[0]
    with pytest.raises(UnsupportedError, match=r"dropout_p: got 0\.5 in training"):
        layer.extend(cache, x, x, x)
    layer = eqx.nn.inference_mode(layer)
    close(layer.extend(cache, x, x, x)[0], layer(x, x, x))
    with pytest.raises(ValueError, match="query: got shape"):
        layer.extend(cache, X, x, x)
