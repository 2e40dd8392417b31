"""Layers of Equinox that keep running statistics, and the parameters of their specs."""

from __future__ import annotations

import io
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from specs_of_words import SPECS, labels_of

import pdcore
from pdcore_adapters.equinox import PDMultiheadAttention, convert

B, N, E, H = 3, 6, 12, 4
D = E // H
RUNNING = "bn(statistics=running)"
TRACKED = [RUNNING, f"{RUNNING}+sh(2,1,2,1)", f"causal+{RUNNING}"]


def layer_of(spec: str, **options: Any) -> tuple[Any, Any]:
    make = eqx.nn.make_with_state(PDMultiheadAttention)
    layer, state = make(H, E, spec=spec, key=jax.random.key(0), **options)
    return layer, state


def drawn(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=jnp.float32)


def batched(layer: Any, x: Any, state: Any, real: Any = None) -> Any:
    """Call a layer on a batch (B, N, E), by vmap along the axis "batch"."""
    real = jnp.ones(x.shape[:2], bool) if real is None else real

    def call(x: Any, real: Any, state: Any) -> Any:
        return layer(x, x, x, key_mask=real, state=state)

    mapped = jax.vmap(call, in_axes=(0, 0, None), out_axes=(0, None), axis_name="batch")
    return eqx.filter_jit(mapped)(x, real, state)


def heads_of(layer: Any, x: Any) -> list[Any]:
    """Return q, k and v of a batch, (B, H, N, D)."""
    projections = (layer.query_proj, layer.key_proj, layer.value_proj)
    return [jnp.swapaxes(jax.vmap(jax.vmap(p))(x).reshape(B, N, H, D), 1, 2) for p in projections]


@pytest.mark.parametrize("spec", TRACKED)
def test_after_one_batch_of_momentum_1_the_state_has_its_statistics(spec: str) -> None:
    layer, state = layer_of(spec, momentum=1.0, axis_name="batch")
    x, real = drawn(B, N, E), jnp.arange(N) < jnp.asarray([[6], [3], [1]])
    _, state = batched(layer, jnp.where(real[..., None], x, jnp.nan), state, real)
    buffers, k = state.get(layer.running), np.asarray(heads_of(layer, x)[1])
    for h, s in enumerate(layer.spec.for_heads(H).heads.scales or (1,) * H):
        windows = [
            np.mean(rows[start : min(start + s, count)], axis=0)
            for rows, count in zip(k[:, h], (6, 3, 1), strict=True)
            for start in range(0, count, s)
        ]
        np.testing.assert_allclose(buffers["running_mean"][h], np.mean(windows, 0), atol=1e-6)
        np.testing.assert_allclose(buffers["running_var"][h], np.var(windows, 0), rtol=1e-5)
    assert buffers["num_batches_tracked"] == 1


@pytest.mark.parametrize("spec", TRACKED)
def test_inference_is_the_call_with_the_state(spec: str) -> None:
    layer, state = layer_of(spec, momentum=None, axis_name="batch")
    for seed in (1, 2):
        _, state = batched(layer, 2.0 * drawn(B, N, E, seed=seed) + 1.0, state)
    x, buffers = drawn(B, N, E), state.get(layer.running)
    params = {name: buffers[f"running_{name}"] for name in ("mean", "var")}
    assert buffers["num_batches_tracked"] == 2
    out = pdcore.attention(*heads_of(layer, x), spec, params=params)
    expected = jax.vmap(jax.vmap(layer.output_proj))(jnp.swapaxes(out, 1, 2).reshape(B, N, E))
    got, after = batched(eqx.nn.inference_mode(layer), x, state)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert eqx.tree_equal(after, state)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (layer, state))
    file.seek(0)
    other = eqx.tree_deserialise_leaves(file, layer_of(spec, momentum=None, axis_name="batch"))
    assert eqx.tree_equal(other[1].get(other[0].running), buffers)


def test_training_has_the_statistics_of_the_call_and_gradients_through_them() -> None:
    layer, state = layer_of(RUNNING)
    other = PDMultiheadAttention(H, E, spec="bn", key=jax.random.key(0))
    x = drawn(N, E)

    def loss(x: Any, layer: Any, **options: Any) -> Any:
        out = layer(x, x, x, **options)
        return jnp.sum(jnp.sin(out[0] if options else out))

    ours, theirs = jax.grad(loss)(x, layer, state=state), jax.grad(loss)(x, other)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_causal_layer_does_not_see_the_future_in_training() -> None:
    layer, state = layer_of(f"causal+{RUNNING}+sh(1,2,1,2)")
    _, state = layer(*(drawn(N, E, seed=3),) * 3, state=state)
    x = drawn(N, E)

    def rows(m: int) -> Any:
        copied = jax.tree.map(lambda leaf: leaf, state)  # Equinox forbids a state to be used twice
        return layer(x[:m], x[:m], x[:m], state=copied)

    whole, after = rows(N)
    for m in (1, 4, 5):
        np.testing.assert_allclose(rows(m)[0], whole[:m], atol=2e-6)
    assert after.get(layer.running)["num_batches_tracked"] == 2


def test_a_state_is_where_the_spec_needs_it() -> None:
    layer, state = layer_of(RUNNING)
    x = drawn(N, E)
    with pytest.raises(TypeError, match=r"state: got NoneType .*running.*, expected an equinox"):
        layer(x, x, x)
    plain = PDMultiheadAttention(H, E, spec="bn", key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"state: got State for softmax\+bn, expected None"):
        plain(x, x, x, state=state)
    with pytest.raises(pdcore.UnsupportedError, match="a mask may hide the future"):
        layer(x, x, x, jnp.tril(jnp.ones((N, N), bool)), state=state)
    layer(x, x, x, jnp.tril(jnp.ones((N, N), bool)), state=state, inference=True)
    for options, message in (({"momentum": 0.5}, "momentum"), ({"axis_name": "b"}, "axis_name")):
        with pytest.raises(ValueError, match=rf"{message}: got .* has no running statistics"):
            PDMultiheadAttention(H, E, spec="bn", key=jax.random.key(0), **options)


@pytest.mark.parametrize("spec", SPECS)
def test_every_word_runs_in_a_layer(spec: str) -> None:
    layer, state = layer_of(spec)
    options = {} if layer.running is None else {"state": state}
    options["labels"] = labels_of(spec, jnp.asarray, (N,))
    for inference in (True, False):
        result = eqx.filter_eval_shape(
            lambda x, inference=inference: layer(x, x, x, **options, inference=inference),
            jnp.ones((N, E)),
        )
        assert (result[0] if layer.running is not None else result).shape == (N, E)


def test_the_slopes_of_alibi_are_kept_and_have_no_gradient() -> None:
    layers = [PDMultiheadAttention(H, E, spec="alibi", key=jax.random.key(i)) for i in range(2)]
    x = drawn(N, E)
    layer = eqx.tree_at(lambda y: y.spec_params["slopes"], layers[0], jnp.asarray([0.3, 0.2, 0, 1]))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, layer)
    file.seek(0)
    other = eqx.tree_deserialise_leaves(file, layers[1])
    np.testing.assert_array_equal(other(x, x, x), layer(x, x, x))
    heads = (
        jax.vmap(p)(x).reshape(N, H, D)
        for p in (other.query_proj, other.key_proj, other.value_proj)
    )
    out = pdcore.attention(*heads, "alibi", params=other.spec_params, layout="bnhd")
    want = jax.vmap(other.output_proj)(out.reshape(N, E))
    np.testing.assert_allclose(other(x, x, x), want, atol=2e-6)
    gradient = eqx.filter_grad(lambda layer: jnp.sum(jnp.sin(layer(x, x, x))))(other)
    assert not jnp.any(gradient.spec_params["slopes"])
    assert jnp.any(gradient.query_proj.weight)


def test_converted_layers_have_a_state_and_parameters() -> None:
    plain = eqx.nn.MultiheadAttention(H, E, key=jax.random.key(0))
    layer = convert(plain, "bn(beta=param,statistics=running)", momentum=0.5)
    state, x = eqx.nn.State(layer), drawn(N, E)
    out, state = layer(x, x, x, state=state)
    assert out.shape == (N, E)
    assert list(layer.spec_params) == ["beta"]
    gated = convert(plain, "iebn(beta=param)")
    assert {name: float(p.mean()) for name, p in gated.spec_params.items()} == {
        "beta": 1.0,
        "slope": 0.0,
        "shift": -1.0,
    }
    gradient = eqx.filter_grad(lambda layer: jnp.sum(jnp.sin(layer(x, x, x))))(gated)
    assert all(jnp.abs(d).max() > 0 for d in gradient.spec_params.values())
