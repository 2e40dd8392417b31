"""Test pdcore_adapters.equinox against equinox.nn.MultiheadAttention and the core."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import pdcore
from pdcore import SpecError, UnsupportedError
from pdcore_adapters.equinox import PDMultiheadAttention, convert

# A program is compiled for each combination, which takes seconds.
pytestmark = pytest.mark.sampled(3)

E, H, N, M, B = 16, 4, 6, 9, 3
PREFIX = "causal+bn(statistics=prefix)"
SIZES = {"key_size": 5, "value_size": 7, "output_size": 11, "qk_size": 6, "vo_size": 3}
BIASES = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}


def close(a: Any, b: Any, *, tolerance: float = 2e-6) -> None:
    (flat, want) = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(flat) == len(want)
    for x, y in zip(flat, want, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        size = max(1.0, float(jnp.max(jnp.abs(y)))) if y.size else 1.0
        np.testing.assert_allclose(x, y, rtol=0.0, atol=tolerance * size)


def drawn(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=jnp.float32)


def hide(*shape: int) -> Any:
    """Return a mask, True where a query may attend, in which every query sees the first key."""
    mask = np.random.default_rng(1).random(shape) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


def pair(**options: Any) -> tuple[Any, Any]:
    """Return Equinox's layer and the adapter's, with the same parameters."""
    key = jax.random.key(0)
    plain = eqx.nn.MultiheadAttention(H, E, **options, key=key)
    return plain, PDMultiheadAttention(H, E, **options, key=key)


def with_gradients(layer: Any, *x: Any, **options: Any) -> Any:
    def loss(moving: Any) -> Any:
        layer, *x = moving
        return jnp.sum(jnp.sin(layer(*x, **options)))

    return eqx.filter_jit(eqx.filter_value_and_grad(loss))((layer, *x))


# --- with softmax it is Equinox's layer -----------------------------------------------------------

MASKS = {"none": None, "2-D": hide(N, M), "heads": hide(H, N, M)}


@pytest.mark.parametrize("mask", [*MASKS])
@pytest.mark.parametrize("options", [{}, SIZES | BIASES], ids=["alike", "sizes"])
def test_it_is_the_layer_of_equinox(mask: str, options: Any) -> None:
    plain, ours = pair(**options)
    x = drawn(N, E), drawn(M, options.get("key_size", E)), drawn(M, options.get("value_size", E))
    (value, got), (expected, want) = (
        with_gradients(layer, *x, mask=MASKS[mask]) for layer in (ours, plain)
    )
    close((value, got), (expected, want), tolerance=5e-6)


def test_a_batch_by_vmap() -> None:
    plain, ours = pair()
    x, mask = drawn(B, N, E), hide(B, N, N)
    got, want = (jax.vmap(lambda x, m, f=f: f(x, x, x, m))(x, mask) for f in (ours, plain))
    close(got, want)
    # Several layers as one, with their arrays stacked.
    keys = jax.random.split(jax.random.key(1), 2)
    stacked = eqx.filter_vmap(lambda key: PDMultiheadAttention(H, E, key=key))(keys)
    each = eqx.filter_vmap(lambda layer, x: layer(x, x, x), in_axes=(eqx.if_array(0), None))
    alone = [PDMultiheadAttention(H, E, key=key)(x[0], x[0], x[0]) for key in keys]
    close(each(stacked, x[0]), jnp.stack(alone))


def test_process_heads() -> None:
    plain, ours = pair()
    x = drawn(N, E)

    def turned(q: Any, k: Any, v: Any) -> Any:
        return jnp.cos(q) + jnp.arange(N)[:, None, None], jnp.sin(k), 2 * v

    got, want = (eqx.filter_jit(layer)(x, x, x, process_heads=turned) for layer in (ours, plain))
    close(got, want)
    with pytest.raises(ValueError, match=r"process_heads: got shapes .* expected \[\(6, 4, 4\)"):
        ours(x, x, x, process_heads=lambda q, k, v: (q, k[1:], v[1:]))


def test_a_feature_map_has_no_dropout() -> None:
    key = jax.random.key(0)
    with pytest.raises(UnsupportedError, match=r"dropout_p: got 0\.5 for the layer, and linear "):
        PDMultiheadAttention(H, E, dropout_p=0.5, spec="linear", key=key)
    plain = eqx.nn.MultiheadAttention(H, E, dropout_p=0.5, key=key)
    with pytest.raises(UnsupportedError, match=r"for the model itself, .*convert\(drop='output'\)"):
        convert(plain, "linear")
    x = drawn(N, E)
    ours = convert(plain, "linear", dropout_p=0)
    inference = convert(eqx.nn.inference_mode(plain), "linear")
    close(ours(x, x, x), inference(x, x, x))


def test_outputs_are_dropped_in_place_of_weights() -> None:
    plain = eqx.nn.MultiheadAttention(H, E, dropout_p=0.25, key=jax.random.key(0))
    ours = convert(plain, "linear", drop="output")
    x, key = drawn(200, E), jax.random.key(1)
    whole = ours(x, x, x, inference=True)
    out = eqx.filter_jit(ours)(x, x, x, key=key)
    kept = out != 0
    close(out, jnp.where(kept, whole / 0.75, 0.0))
    assert abs(kept.mean() - 0.75) < 5 * (0.1875 / kept.size) ** 0.5
    assert convert(ours, "relu").drop == "output"  # a converted layer drops what it did
    with pytest.raises(UnsupportedError, match="relu has no weights to drop"):
        convert(ours, "relu", drop="weights")
    with pytest.raises(ValueError, match="key: got None in training"):
        ours(x, x, x)
    with pytest.raises(ValueError, match="drop: got 'heads'"):
        PDMultiheadAttention(H, E, drop="heads", key=key)


def test_dropout() -> None:
    plain, ours = pair(dropout_p=0.5)
    x = drawn(N, E)
    key = jax.random.key(0)
    close(ours(x, x, x, inference=True, key=key), plain(x, x, x, inference=True))
    for options in ({}, {"inference": False}):
        with pytest.raises(ValueError, match=r"key: got None in training with dropout_p 0\.5"):
            ours(x, x, x, **options)
    first, again, other = (ours(x, x, x, key=jax.random.key(seed)) for seed in (0, 0, 1))
    close(first, again)
    assert jnp.abs(first - other).max() > 1e-3
    loss = eqx.filter_grad(lambda layer: (layer(x, x, x, key=key) ** 2).sum())
    grads = eqx.filter_jit(loss)(ours)
    assert jnp.abs(grads.query_proj.weight).max() > 0
    close(eqx.nn.inference_mode(ours)(x, x, x), plain(x, x, x, inference=True))
    with pytest.raises(ValueError, match="key: got None"):
        eqx.nn.inference_mode(ours)(x, x, x, inference=False)
    for layer in (plain, ours):
        with pytest.warns(UserWarning, match="deprecated in favour of"):
            layer(x, x, x, deterministic=True)
    with pytest.warns(UserWarning, match="deprecated"), pytest.raises(ValueError, match="key"):
        ours(x, x, x, deterministic=False)
    plain, ours = pair()
    close(ours(x, x, x, inference=False), plain(x, x, x, inference=False))


# --- leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,1,2,2)"])
def test_leaves_load_both_ways(spec: str) -> None:
    options = SIZES | BIASES | {"dropout_p": 0.25}
    plain = eqx.nn.MultiheadAttention(H, E, **options, key=jax.random.key(0))
    ours = PDMultiheadAttention(H, E, **options, key=jax.random.key(1), spec=spec)
    paths = [
        [
            (jax.tree_util.keystr(path), jnp.shape(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(layer)
        ]
        for layer in (plain, ours)
    ]
    assert paths[0] == paths[1]
    for one, other in ((plain, ours), (ours, plain)):
        file = io.BytesIO()
        eqx.tree_serialise_leaves(file, one)
        file.seek(0)
        loaded = eqx.tree_deserialise_leaves(file, other)
        assert type(loaded) is type(other)
        assert not np.array_equal(other.key_proj.weight, one.key_proj.weight)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(one), strict=True):
            assert np.array_equal(a, b)
    moved = eqx.tree_at(lambda layer: layer.query_proj, ours, plain.query_proj)
    assert moved.query_proj.weight is plain.query_proj.weight
    assert moved.spec == ours.spec


def test_layers_of_one_spec_have_one_structure() -> None:
    one, other = (
        PDMultiheadAttention(H, E, spec=spec, key=jax.random.key(i))
        for i, spec in enumerate(("bn", "softmax + bn"))
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    softmax = PDMultiheadAttention(H, E, key=jax.random.key(0))
    assert jax.tree.structure(one) != jax.tree.structure(softmax)
    mean = jax.tree.map(lambda a, b: (a + b) / 2 if eqx.is_array(a) else a, one, other)
    assert mean.spec == one.spec
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # noqa: S301 - pickled here
        assert eqx.tree_equal(again, one)


def test_beta_is_a_last_leaf() -> None:
    plain, _ = pair()
    layer = convert(plain, "bn(beta=param)")
    *before, beta = jax.tree.leaves(eqx.filter(layer, eqx.is_array))
    assert len(before) == len(jax.tree.leaves(eqx.filter(plain, eqx.is_array)))
    assert beta.tolist() == [1.0] * H
    x = drawn(N, E)
    value, (grads, *_) = with_gradients(layer, x, x, x)
    close(value, jnp.sum(jnp.sin(convert(plain, "bn")(x, x, x))))
    assert grads.spec_params["beta"].shape == (H,)
    assert bool(jnp.any(grads.spec_params["beta"] != 0))
    assert convert(layer, "bn").spec_params == {}


def test_sinks_are_a_leaf_that_starts_at_zero() -> None:
    plain, _ = pair()
    layer = convert(plain, "h(sum,sink=param)")
    assert layer.spec_params["sink"].tolist() == [0.0] * H
    x = drawn(N, E)
    value, (grads, *_) = with_gradients(layer, x, x, x)
    close(value, jnp.sum(jnp.sin(convert(plain, "h(sum,sink=0)")(x, x, x))))
    assert bool(jnp.all(grads.spec_params["sink"] != 0))


# --- specs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "bn",
        "bn(with_std=false)",
        "linear",
        "bn+sh(1,1,2,2)",
        PREFIX,
        "sparse(2,1)",
        "gaussian(gamma=0.3)+h(count)",
    ],
)
def test_specs_equal_the_core(spec: str) -> None:
    plain, _ = pair(**BIASES)
    layer = convert(plain, spec)
    x = drawn(B, N, E)
    real = jnp.arange(N) < jnp.asarray([6, 4, 1])[:, None]
    heads = [
        np.asarray(x @ p.weight.T + p.bias).reshape(B, N, H, -1).swapaxes(1, 2)
        for p in (plain.query_proj, plain.key_proj, plain.value_proj)
    ]
    want = pdcore.attention(*heads, spec, key_mask=np.asarray(real)).swapaxes(1, 2)
    want = want.reshape(B, N, E) @ plain.output_proj.weight.T + plain.output_proj.bias
    poisoned = jnp.where(real[..., None], x, jnp.nan)
    got = jax.jit(jax.vmap(lambda x, y, real: layer(x, y, y, key_mask=real)))(x, poisoned, real)
    np.testing.assert_allclose(got, want, rtol=0.0, atol=5e-6)


def test_a_mask_that_may_hide_the_future() -> None:
    x, later = drawn(N, E), drawn(N, E).at[-1].add(1.0)
    plain, _ = pair()
    causal = jnp.tril(jnp.ones((N, N), bool))
    for spec in ("bn", "linear+bn", "bn(statistics=batch)+sh(1,1,2,2)"):
        layer = convert(plain, spec)
        for run in (layer, eqx.filter_jit(layer)):
            with pytest.raises(UnsupportedError, match=r"mask: .* a mask may hide the future"):
                run(x, x, x, causal)
    run = eqx.filter_jit(convert(plain, PREFIX))
    close(run(x, later, later, causal)[:-1], run(x, x, x)[:-1], tolerance=0.0)
    leak = convert(plain, "bn(allow_leak=true)")
    assert not np.allclose(leak(x, later, later, causal)[2], leak(x, x, x, causal)[2])


def test_decoding_by_an_offset() -> None:
    plain, _ = pair()
    layer = convert(plain, f"{PREFIX}+sh(1,1,2,2)")
    x = drawn(N, E)
    want = layer(x, x, x)
    step = eqx.filter_jit(lambda x, key, i: layer(x, key, key, offset=i))
    got = [step(x[i : i + 1], x, jnp.asarray(i)) for i in range(N)]
    close(jnp.concatenate(got), want)
    with pytest.raises(ValueError, match="offset: missing for 1 queries and 6 keys"):
        layer(x[:1], x, x)
    close(plain(x[:1], x, x), convert(plain, "softmax")(x[:1], x, x))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("sofmax", SpecError, "did you mean 'softmax'"),
        ("sh(1,2)", ValueError, "spec: got 2 scales .* each of the 4 heads of the layer"),
        ("causal+bn", UnsupportedError, "the future leaks"),
    ],
)
def test_specs_that_do_not_fit(spec: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        PDMultiheadAttention(H, E, spec=spec, key=jax.random.key(0))


def test_wrong_arguments_are_named() -> None:
    _, layer = pair()
    x = drawn(N, E)
    with pytest.raises(ValueError, match=r"query: got shape \(1, 6, 16\), .* use jax.vmap"):
        layer(x[None], x, x)
    with pytest.raises(ValueError, match="value: got 5 elements, expected 6 like key_"):
        layer(x, x, x[1:])
    with pytest.raises(ValueError, match=r"mask: got shape \(6,\), expected \(6, 6\) or \(4, 6"):
        layer(x, x, x, jnp.ones(N, bool))
    with pytest.raises(TypeError, match="mask: got dtype float32, expected bool"):
        layer(x, x, x, jnp.ones((N, N)))
    with pytest.raises(ValueError, match=r"key_mask: got shape \(5,\)"):
        layer(x, x, x, key_mask=jnp.ones(5, bool))


# --- convert --------------------------------------------------------------------------------------


class Block(eqx.Module):
    attention: Any
    linear: eqx.nn.Linear

    def __call__(self, x: Any) -> Any:
        return jax.vmap(self.linear)(x + self.attention(x, x, x))


class Model(eqx.Module):
    blocks: list[Block]

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


class Own(eqx.nn.MultiheadAttention):
    pass


def model(kind: Any = eqx.nn.MultiheadAttention) -> Model:
    keys = jax.random.split(jax.random.key(0), 4)
    layers = (eqx.nn.MultiheadAttention(H, E, key=keys[0]), kind(H, E, key=keys[1]))
    return Model([Block(layer, eqx.nn.Linear(E, E, key=keys[2])) for layer in layers])


def test_convert_gives_a_new_model_with_the_same_arrays() -> None:
    plain = model()
    x = drawn(N, E)
    ours = convert(plain, "softmax")
    assert type(plain.blocks[0].attention) is eqx.nn.MultiheadAttention
    assert all(type(b.attention) is PDMultiheadAttention for b in ours.blocks)
    assert all(a is b for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True))
    close(ours(x), plain(x))
    again = convert(ours, "bn")
    assert {str(b.attention.spec) for b in again.blocks} == {"softmax+bn"}
    assert str(ours.blocks[0].attention.spec) == "softmax"
    assert not np.allclose(again(x), plain(x))
    names: list[str] = []

    def first(name: str, layer: Any) -> bool:
        names.append(name)
        return name.startswith(".blocks[0]")

    mixed = convert(plain, "sh(1,1,2,2)", select=first)
    assert names == [".blocks[0].attention", ".blocks[1].attention"]
    assert type(mixed.blocks[1].attention) is eqx.nn.MultiheadAttention
    assert str(mixed.blocks[0].attention.spec) == "softmax+sh(1,1,2,2)"


def test_one_spec_fits_layers_of_any_number_of_heads() -> None:
    x = drawn(N, 12)
    for heads, written in ((1, "sh(1)"), (2, "sh(1,2)"), (3, "sh(1,1,2)")):
        plain = eqx.nn.MultiheadAttention(heads, 12, key=jax.random.key(0))
        halves, explicit = convert(plain, "bn+sh(half=2)"), convert(plain, f"bn+{written}")
        close(halves(x, x, x), explicit(x, x, x))


def test_what_is_not_converted_is_said() -> None:
    with pytest.raises(ValueError, match=r"nothing to convert: no equinox\.nn\.Multi"):
        convert(eqx.nn.Linear(2, 2, key=jax.random.key(0)), "bn")
    with pytest.raises(ValueError, match="was selected"):
        convert(model(), "bn", select=lambda name, layer: False)
    with pytest.raises(ValueError, match=r"2 scales .* 4 heads of \.blocks\[0\]\.attention"):
        convert(model(), "sh(1,2)")
    with pytest.raises(UnsupportedError, match=r"\.blocks\[1\]\.attention: it is a .*Own, whose"):
        convert(model(Own), "bn")
    kept = convert(model(Own), "bn", select=lambda name, layer: type(layer) is not Own)
    assert type(kept.blocks[1].attention) is Own


def test_the_backend_is_settled() -> None:
    x = drawn(N, E)
    with pdcore.use_backend("jax"):
        layer = PDMultiheadAttention(H, E, key=jax.random.key(0))
    with pdcore.use_backend("strict"):
        layer(x, x, x)
        with pytest.raises((pdcore.NoBackendError, UnsupportedError), match="strict"):
            eqx.filter_jit(convert(layer, "bn"))(x, x, x)
