"""Layers of Flax, NNX and Linen, that keep running statistics and the parameters of their specs."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import numpy as jnp
from specs_of_words import SPECS, labels_of, needs_arrays

import pdcore
from pdcore_adapters.flax import LinenSpecAttention, PackedMask, SpecAttention, attention_fn

B, N, E, H = 3, 6, 12, 4
D = E // H
RUNNING = "bn(statistics=running)"
POOLED = f"{RUNNING}+sh(2,1,2,1)"
REAL = jnp.arange(N) < jnp.asarray([[6], [3], [1]])
MASK = REAL[:, None, None]


def drawn(*shape: int, seed: int = 0) -> Any:
    shape = shape or (B, N, E)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=jnp.float32)


def layer_of(spec: str, **options: Any) -> Any:
    attend = SpecAttention(spec, H, D, **options)
    return nnx.MultiHeadAttention(H, E, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))


def linen_of(spec: str, **options: Any) -> Any:
    return linen.MultiHeadDotProductAttention(H, attention_fn=LinenSpecAttention(spec, **options))


def check_moments(spec: Any, k: Any, mean: Any, var: Any) -> None:
    """Check the statistics of the pooled real keys of k (B, N, H, D)."""
    for h, s in enumerate(spec.for_heads(H).heads.scales or (1,) * H):
        windows = [
            np.mean(rows[start : min(start + s, count)], axis=0)
            for rows, count in zip(np.asarray(k)[:, :, h], (6, 3, 1), strict=True)
            for start in range(0, count, s)
        ]
        np.testing.assert_allclose(mean[h], np.mean(windows, 0), atol=1e-6)
        np.testing.assert_allclose(var[h], np.var(windows, 0), rtol=1e-5)


@pytest.mark.parametrize("spec", [POOLED, f"causal+{RUNNING}"])
def test_after_one_batch_of_momentum_1_the_buffers_are_its_statistics(spec: str) -> None:
    layer, x = layer_of(spec, momentum=1.0), drawn()
    kept = layer.attention_fn
    nnx.jit(lambda layer, x: layer(x, mask=MASK))(layer, jnp.where(REAL[..., None], x, 1e6))
    k = layer.key(jnp.where(REAL[..., None], x, 0.0))
    check_moments(kept.spec, k, kept.running_mean[...], kept.running_var[...])
    assert kept.num_batches_tracked[...] == 1


def test_evaluation_is_the_call_with_the_buffers() -> None:
    layer, x = layer_of(POOLED, momentum=None), drawn()
    for seed in (1, 2):
        layer(2.0 * drawn(seed=seed) + 1.0)
    kept = layer.attention_fn
    params = {"mean": kept.running_mean[...], "var": kept.running_var[...]}
    out = pdcore.attention(
        layer.query(x), layer.key(x), layer.value(x), POOLED, params=params, layout="bnhd"
    )
    layer.eval()
    np.testing.assert_allclose(layer(x), layer.out(out), atol=2e-6)
    assert kept.num_batches_tracked[...] == 2
    other = layer_of(POOLED, momentum=None)
    nnx.update(other, nnx.state(layer))
    other.eval()
    np.testing.assert_array_equal(other(x), layer(x))


def test_training_is_that_of_batch_statistics() -> None:
    layer, x = layer_of(RUNNING), drawn()
    other = layer_of(RUNNING.replace("running", "batch"))

    def loss(layer: Any) -> Any:
        return jnp.sum(jnp.sin(layer(x, mask=MASK)))

    ours, theirs = (nnx.grad(loss)(one) for one in (layer, other))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_causal_layer_does_not_see_the_future_in_training() -> None:
    layer, x = layer_of(f"causal+{RUNNING}"), drawn()
    layer(drawn(seed=3))
    whole = nnx.clone(layer)(x)
    for m in (1, 4):
        np.testing.assert_allclose(nnx.clone(layer)(x[:, :m]), whole[:, :m], atol=2e-6)
    with pytest.raises(pdcore.UnsupportedError, match="may be causal"):
        layer_of(RUNNING)(x, mask=nnx.make_causal_mask(x[..., 0]))


def test_parameters_start_as_the_spec_says_and_learn() -> None:
    layer, x = layer_of("iebn(beta=param)"), drawn()
    starts = {n: float(jnp.mean(p[...])) for n, p in nnx.state(layer.attention_fn).items()}
    assert starts == {"spec_beta": 1.0, "spec_slope": 0.0, "spec_shift": -1.0}
    gradient = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x))))(layer)
    for name in starts:
        assert jnp.abs(gradient["attention_fn"][name][...]).max() > 0


@pytest.mark.parametrize("spec", SPECS)
def test_every_word_runs_in_a_module_or_a_function(spec: str) -> None:
    x = jnp.ones((B, N, E))
    for training in (True, False):
        layer = layer_of(spec, use_running_average=not training)
        labels = labels_of(spec, jnp.asarray, (B, N))
        mask = None if labels is None else PackedMask(labels=labels)
        shape = nnx.eval_shape(lambda layer, x, mask=mask: layer(x, mask=mask), layer, x).shape
        assert shape == x.shape
    if needs_arrays(spec):
        with pytest.raises(pdcore.UnsupportedError, match="use SpecAttention, or LinenSpec"):
            attention_fn(spec)
    else:
        heads = jnp.ones((B, N, H, D))
        assert jax.eval_shape(attention_fn(spec), heads, heads, heads).shape == heads.shape


def test_linen_equals_nnx() -> None:
    spec, x = "bn(beta=param,statistics=running)+sh(half=2)", drawn()
    layer, module = layer_of(spec, momentum=0.5), linen_of(spec, momentum=0.5)
    variables = module.init(jax.random.key(0), x)
    assert variables["batch_stats"]["attention_fn"]["num_batches_tracked"] == 0
    assert variables["params"]["attention_fn"]["spec_beta"].shape == (H,)
    params = {
        name: {n: p[...] for n, p in nnx.state(getattr(layer, name)).items()}
        for name in ("query", "key", "value", "out")
    }
    variables["params"] = {**params, "attention_fn": {"spec_beta": jnp.ones(H)}}
    out, changed = jax.jit(lambda v, x: module.apply(v, x, mask=MASK, mutable="batch_stats"))(
        variables, x
    )
    np.testing.assert_allclose(out, layer(x, mask=MASK), atol=2e-6)
    kept = changed["batch_stats"]["attention_fn"]
    for name, value in kept.items():
        np.testing.assert_allclose(value, getattr(layer.attention_fn, name)[...], atol=1e-6)
    layer.eval()
    fixed = linen_of(spec, momentum=0.5, use_running_average=True)
    out = fixed.apply({"params": variables["params"], **changed}, x, mask=MASK)
    np.testing.assert_allclose(out, layer(x, mask=MASK), atol=2e-6)


def test_the_slopes_of_alibi_are_kept_and_not_learned() -> None:
    layer, module, x = layer_of("alibi"), linen_of("alibi"), drawn()
    kept = layer.attention_fn.slopes
    assert isinstance(kept, nnx.BatchStat)
    kept[...] = kept[...] * 1.5
    attend = SpecAttention("alibi", 2, D, query_heads=12, param_dtype=jnp.bfloat16)
    assert attend.slopes.shape == (12,)
    assert attend.slopes.dtype == jnp.float32  # as in a call: 2^-0.5 has no 16 bits
    other = layer_of("alibi")
    nnx.update(other, nnx.state(layer))
    np.testing.assert_array_equal(other(x), layer(x))
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    out = pdcore.attention(q, k, v, "alibi", params={"slopes": kept[...]}, layout="bnhd")
    np.testing.assert_allclose(layer(x), layer.out(out), atol=2e-6)
    variables = module.init(jax.random.key(0), x)
    assert "attention_fn" not in variables["params"]
    np.testing.assert_array_equal(
        variables["batch_stats"]["attention_fn"]["slopes"] * 1.5, kept[...]
    )
    assert module.apply(variables, x).shape == x.shape


def test_an_axis_joins_the_batch() -> None:
    layer, whole, x = layer_of(RUNNING, axis_name="devices"), layer_of(RUNNING), drawn(4, N, E)

    @nnx.vmap(in_axes=(None, 0), out_axes=0, axis_name="devices")
    def run(layer: Any, x: Any) -> Any:
        return layer(x)

    run(layer, x.reshape(2, 2, N, E))
    whole(x)
    for name in ("running_mean", "running_var"):
        ours, theirs = (getattr(one.attention_fn, name)[...] for one in (layer, whole))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"momentum: got 0\.5, and softmax\+bn has no running"):
        SpecAttention("bn", H, D, momentum=0.5)
    with pytest.raises(ValueError, match=r"axis_name: got 'x', and softmax\+bn has no running"):
        SpecAttention("bn", H, D, axis_name="x")
    with pytest.raises(ValueError, match=r"2 scales in .* each of the 4 heads of the layer"):
        SpecAttention("sh(1,2)", H, D)
