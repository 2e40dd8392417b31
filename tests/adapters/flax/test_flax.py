"""Test pdcore_adapters.flax, on NNX and Linen, against Flax's attention and the core."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import numpy as jnp

import pdcore
from pdcore import NoBackendError, SpecError, UnsupportedError
from pdcore_adapters.flax import LinenSpecAttention, SpecAttention, attention_fn

# A program is compiled for each combination, which takes seconds.
pytestmark = pytest.mark.sampled(3)

E, H, N, M, B = 16, 4, 6, 9, 3
PREFIX = "causal+bn(statistics=prefix)"
CAUSAL = ["causal", f"{PREFIX}+sh(1,1,2,2)", "bn(statistics=prefix)+sparse(3,0)"]


def close(a: Any, b: Any, *, tolerance: float = 2e-6) -> None:
    """Compare trees of arrays, each by its largest element."""
    (flat, structure), (want, expected) = jax.tree.flatten(a), jax.tree.flatten(b)
    assert structure == expected
    for x, y in zip(flat, want, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        size = max(1.0, float(jnp.max(jnp.abs(y)))) if y.size else 1.0
        np.testing.assert_allclose(x, y, rtol=0.0, atol=tolerance * size)


def drawn(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=jnp.float32)


def hide(*shape: int, seed: int = 1) -> Any:
    """Return a mask, True where a query may attend, in which every query sees the first key."""
    mask = np.random.default_rng(seed).random(shape) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


def real(lengths: list[int], m: int) -> Any:
    return jnp.arange(m) < jnp.asarray(lengths)[:, None]


def causal(n: int) -> Any:
    return jnp.tril(jnp.ones((n, n), dtype=bool))


# --- with softmax the layers equal Flax's attention -----------------------------------------------


def nnx_pair(spec: str = "softmax", **options: Any) -> tuple[Any, Any]:
    """Return a layer of Flax and one with pdcore's attention, with the same parameters."""
    arguments = {"num_heads": H, "in_features": E, "decode": False} | options
    plain = nnx.MultiHeadAttention(**arguments, rngs=nnx.Rngs(0))
    ours = nnx.MultiHeadAttention(**arguments, attention_fn=attention_fn(spec), rngs=nnx.Rngs(1))
    nnx.update(ours, nnx.state(plain))
    return plain, ours


def linen_pair(spec: str = "softmax", **options: Any) -> tuple[Any, Any, Any]:
    arguments = {"num_heads": H} | options
    plain = linen.MultiHeadDotProductAttention(**arguments)
    ours = linen.MultiHeadDotProductAttention(**arguments, attention_fn=attention_fn(spec))
    return plain, ours, plain.init(jax.random.key(0), drawn(B, N, E), deterministic=True)


MASKS: dict[str, Any] = {
    "none": None,
    "padding": real([9, 4, 1], M)[:, None, None, :],
    "attention": nnx.make_attention_mask(real([6, 6, 2], N), real([9, 4, 1], M)),
    "one for all": hide(N, M),
    "heads": hide(B, H, N, M),
    "head": hide(1, H, 1, M),
    "causal": nnx.make_causal_mask(jnp.ones((B, N)))[..., :N],
}


@pytest.mark.parametrize("mask", [*MASKS])
def test_nnx(mask: str) -> None:
    plain, ours = nnx_pair(normalize_qk=mask == "none")
    m = N if mask == "causal" else M
    x, y, z = drawn(B, N, E), drawn(B, m, E, seed=1), drawn(B, m, E, seed=2)
    options = MASKS[mask]
    seen = jnp.ones((B, N, 1)) if mask != "attention" else real([6, 6, 2], N)[..., None]

    def loss(layer: Any, *args: Any) -> Any:
        # Flax and pdcore differ on rows that see no key: leave them out of the loss.
        return jnp.sum(jnp.sin(layer(*args, mask=options)) * seen)

    step = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    close(step(ours, x, y, z), step(plain, x, y, z), tolerance=5e-6)


@pytest.mark.parametrize("mask", ["none", "attention", "heads"])
def test_linen(mask: str) -> None:
    plain, ours, variables = linen_pair()
    m = N if mask == "causal" else M
    x, y, z = drawn(B, N, E), drawn(B, m, E, seed=1), drawn(B, m, E, seed=2)
    seen = jnp.ones((B, N, 1)) if mask != "attention" else real([6, 6, 2], N)[..., None]

    def loss(layer: Any) -> Any:
        def run(variables: Any, *args: Any) -> Any:
            return jnp.sum(jnp.sin(layer.apply(variables, *args, mask=MASKS[mask])) * seen)

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3)))

    close(loss(ours)(variables, x, y, z), loss(plain)(variables, x, y, z), tolerance=5e-6)


def test_the_function_by_itself() -> None:
    """Check every argument, without a layer, for any number of leading axes."""
    ours = attention_fn()
    run = jax.jit(ours)
    for lead in ((), (2, B)):
        q, k, v = drawn(*lead, N, H, 8), drawn(*lead, M, H, 8, seed=1), drawn(*lead, M, H, 8)
        options = {"mask": hide(*lead, 1, N, M), "bias": drawn(H, N, M, seed=4)}
        close(run(q, k, v, **options), linen.dot_product_attention(q, k, v, **options))
        options["mask"] = hide(N, M)
        close(run(q, k, v, **options), linen.dot_product_attention(q, k, v, **options))
    want = nnx.dot_product_attention(q, q, q, is_causal=True)
    close(ours(q, q, q, is_causal=True), want)
    # The first two arguments after the arrays are bias and mask, in Flax as in pdcore.
    options = [options["bias"], options["mask"]]
    want = linen.dot_product_attention(q, k, v, *options)
    close(ours(q, k, v, *options), want)
    for precision in (jax.lax.Precision.HIGHEST, "highest", ("highest", "default")):
        close(ours(q, k, v, *options, precision=precision, dtype=jnp.float32), want)


def test_a_bias_gets_its_gradient() -> None:
    q, k, v = (drawn(B, n, H, 8, seed=n) for n in (N, M, M))

    def grad(fn: Any) -> Any:
        return jax.grad(lambda b: jnp.sum(jnp.sin(fn(q, k, v, b))))(drawn(1, H, N, M))

    close(grad(attention_fn()), grad(linen.dot_product_attention))


def test_grouped_heads() -> None:
    plain, ours = nnx_pair(num_heads=4, num_kv_heads=2)
    x = drawn(B, N, E)
    close(ours(x), plain(x))
    _, scaled = nnx_pair("sh(1,2)", num_heads=4, num_kv_heads=2)
    assert scaled(x).shape == x.shape


def test_vmap() -> None:
    plain, ours = nnx_pair()
    x, mask = drawn(B, N, E), hide(B, 1, N, N)

    def each(layer: Any) -> Any:
        return nnx.vmap(lambda layer, x, mask: layer(x, mask=mask), in_axes=(None, 0, 0))(
            layer, x, mask
        )

    close(each(ours), plain(x, mask=mask))
    fn = attention_fn("bn")
    q = drawn(B, N, H, 4)
    close(
        jax.vmap(lambda q, m: fn(q, q, q, mask=m))(q, real([6, 4, 2], N)[:, None, None]),
        fn(q, q, q, mask=real([6, 4, 2], N)[:, None, None]),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype: str) -> None:
    """Check that the layer casts, and errs from the float32 result no more than Flax's does."""
    plain, ours = nnx_pair(dtype=jnp.dtype(dtype))
    exact = nnx_pair()[0]
    x = drawn(B, N, E)
    assert ours(x).dtype == jnp.dtype(dtype)
    error, known = (float(jnp.max(jnp.abs(layer(x) - exact(x)))) for layer in (ours, plain))
    assert error < 1.5 * known


def test_float64_is_float64(wide: None) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, n, H, 8))) for n in (N, M, M))
    s = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8)
    w = jnp.exp(s - s.max(-1, keepdims=True))
    want = jnp.einsum("bhnm,bmhd->bnhd", w / w.sum(-1, keepdims=True), v)
    close(attention_fn()(q, k, v), want, tolerance=1e-14)
    with pytest.raises(UnsupportedError, match="force_fp32_for_softmax: got True for float64"):
        attention_fn()(q, k, v, force_fp32_for_softmax=True)
    close(attention_fn()(q, k, v, dtype=jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize(
    "spec",
    [
        "softmax",
        "bn",
        "bn(with_std=false)",
        "linear",
        "bn+sh(1,1,2,2)",
        PREFIX,
        "gaussian(gamma=0.3)+h(count)",
    ],
)
def test_specs_equal_the_core(spec: str) -> None:
    q, k, v = (drawn(B, N, H, 8, seed=n) for n in range(3))
    padding = real([6, 4, 1], N)
    want = pdcore.attention(
        *(np.swapaxes(np.asarray(x), 1, 2) for x in (q, k, v)), spec, key_mask=np.asarray(padding)
    )
    for mask in (padding[:, None, None], padding[:, None, None].astype(jnp.int8)):
        got = attention_fn(spec)(q, k, v, mask=mask)
        np.testing.assert_allclose(np.swapaxes(got, 1, 2), want, rtol=0.0, atol=5e-6)


def test_padding_may_hold_anything() -> None:
    fn = attention_fn("bn+sh(1,1,2,2)")
    x, padding = drawn(B, N, H, 8), real([6, 4, 1], N)
    mask = padding[:, None, None]
    poisoned = jnp.where(padding[..., None, None], x, jnp.nan)
    close(fn(x, poisoned, poisoned, mask=mask), fn(x, x, x, mask=mask), tolerance=0.0)


# --- weights, dropout and the other arguments -----------------------------------------------------


@pytest.mark.parametrize("spec", ["softmax", "bn"])
def test_weights_are_sown(spec: str) -> None:
    plain, ours = nnx_pair(spec)
    x, mask = drawn(B, N, E), real([6, 4, 2], N)[:, None, None]
    [actual], [want] = (
        nnx.capture(layer, nnx.Intermediate)(x, mask=mask, sow_weights=True)[1][
            "attention_weights"
        ].get_value()
        for layer in (ours, plain)
    )
    assert actual.shape == want.shape == (B, H, N, N)
    if spec == "softmax":
        close(actual, want)
    np.testing.assert_allclose(actual.sum(-1), 1.0, rtol=1e-6)
    assert not actual[1, :, :, 4:].any()

    plain, ours, variables = linen_pair(spec)
    sown = [
        layer.apply(variables, x, mask=mask, sow_weights=True, mutable=["intermediates"])[1]
        for layer in (ours, plain)
    ]
    assert sown[0]["intermediates"]["attention_weights"][0].shape == (B, H, N, N)
    if spec == "softmax":
        close(*sown)
    with pytest.raises(TypeError, match="module: got object"):
        attention_fn()(*[drawn(B, N, H, 4)] * 3, module=object())


def test_dropout_with_a_feature_map_is_refused_at_the_first_call() -> None:
    attend, x = attention_fn("linear"), drawn(B, N, E)
    options = {"dropout_rate": 0.5, "attention_fn": attend, "deterministic": True}
    match = r"dropout_rate: got 0\.5 for the layer, and linear .*dropout_rate=0\.0"
    layer = nnx.MultiHeadAttention(H, E, decode=False, rngs=nnx.Rngs(0), **options)
    with pytest.raises(UnsupportedError, match=match):
        layer(x)
    with pytest.raises(UnsupportedError, match=match):
        linen.MultiHeadDotProductAttention(H, **options).init(jax.random.key(0), x)


@pytest.mark.parametrize("kind", ["nnx", "linen", "nnx with arrays", "linen with arrays"])
def test_outputs_of_heads_are_dropped_in_place_of_weights(kind: str) -> None:
    spec = "linear+bn(beta=param)" if "arrays" in kind else "linear"
    match kind:
        case "nnx with arrays":
            inner: Any = SpecAttention(spec, H, E // H, drop="output")
        case "linen with arrays":
            inner = LinenSpecAttention(spec, drop="output")
        case _:
            inner = attention_fn(spec, drop="output")
    options = {"dropout_rate": 0.25, "attention_fn": inner}
    x = drawn(B, 100, E)
    if kind.startswith("nnx"):
        layer = nnx.MultiHeadAttention(H, E, decode=False, rngs=nnx.Rngs(0), **options)
        layer.out = lambda heads, **_: heads
        whole = layer(x, deterministic=True)
        out = layer(x, deterministic=False, rngs=nnx.Rngs(dropout=1))
    else:
        layer = linen.MultiHeadDotProductAttention(H, **options)
        variables = layer.init(jax.random.key(0), x, deterministic=True)
        kernel = jnp.eye(E).reshape(H, E // H, E)
        variables["params"]["out"]["kernel"] = kernel
        whole = layer.apply(variables, x, deterministic=True)
        keys = {"dropout": jax.random.key(1)}
        out = layer.apply(variables, x, deterministic=False, rngs=keys)
    kept = out != 0
    close(out, jnp.where(kept, whole / 0.75, 0.0))
    assert abs(kept.mean() - 0.75) < 5 * (0.1875 / kept.size) ** 0.5


def test_what_dropout_drops_is_part_of_the_function() -> None:
    ours = attention_fn("linear", drop="output")
    assert ours != attention_fn("linear")
    assert repr(ours) == "<pdcore attention_fn('linear', drop='output')>"
    assert copy.deepcopy(ours) == ours
    with pytest.raises(ValueError, match="drop: got 'heads', expected 'weights' or 'output'"):
        attention_fn("linear", drop="heads")


def test_dropout_in_training() -> None:
    plain, ours = nnx_pair(dropout_rate=0.5)
    x = drawn(B, N, E)
    close(ours(x, deterministic=True), plain(x, deterministic=True))
    first, again, other = (
        ours(x, deterministic=False, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1)
    )
    close(first, again)
    assert jnp.abs(first - other).max() > 1e-3
    plain, ours, variables = linen_pair(dropout_rate=0.5)
    close(
        ours.apply(variables, x, deterministic=True), plain.apply(variables, x, deterministic=True)
    )
    first, again, other = (
        ours.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    close(first, again)
    assert jnp.abs(first - other).max() > 1e-3


def test_dropout_has_the_seed_of_the_key() -> None:
    q, k, v = (drawn(B, N, H, 4) for _ in range(3))
    key = jax.random.key(3)
    out = attention_fn("bn")(q, k, v, dropout_rng=key, dropout_rate=0.4)
    seed = jax.random.bits(key, (2,), jnp.uint32)
    close(out, pdcore.attention(q, k, v, "bn", dropout=0.4, seed=seed, layout="bnhd"))
    with pytest.raises(ValueError, match="dropout_rng: got None"):
        attention_fn("bn")(q, k, v, dropout_rate=0.4)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_layers_with_arrays_train_with_dropout(kind: str) -> None:
    x = drawn(B, N, E)
    options = {"dropout_rate": 0.4, "deterministic": False}
    if kind == "nnx":
        attend = SpecAttention("bn(beta=param)", H, E // H)
        layer = nnx.MultiHeadAttention(
            H, E, decode=False, rngs=nnx.Rngs(0), attention_fn=attend, **options
        )
        outs = [layer(x, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 1)]
    else:
        attend = LinenSpecAttention("bn(beta=param)")
        layer = linen.MultiHeadDotProductAttention(H, attention_fn=attend, **options)
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = layer.init(keys, x)
        outs = [
            layer.apply(variables, x, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)
        ]
    assert jnp.abs(outs[0] - outs[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"einsum_dot_general": jax.lax.dot_general}, "einsum_dot_general: got"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum: got"),
        ({"attn_weights_value_einsum": jnp.einsum}, "attn_weights_value_einsum: got"),
        ({"precision": "F32_F32_F32"}, "precision: got 'F32_F32_F32'"),
        ({"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32}, "precision: got"),
    ],
)
def test_refused_arguments_are_named(options: Any, message: str) -> None:
    x = drawn(B, N, H, 4)
    with pytest.raises(UnsupportedError, match=message):
        attention_fn()(x, x, x, **options)


def test_linen_passes_what_it_is_asked_to() -> None:
    """Check that Linen passes every argument: it leaves out those that it does not find by name."""
    ours = inspect.signature(attention_fn()).parameters
    for known in (linen.dot_product_attention, nnx.dot_product_attention):
        theirs = inspect.signature(known).parameters
        assert theirs.keys() <= ours.keys()
        assert all(
            ours[name].default == theirs[name].default for name in theirs if name != "promote_dtype"
        )
    assert [*ours][:5] == ["query", "key", "value", "bias", "mask"]
    layer = linen_pair(
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(UnsupportedError, match="qk_attn_weights_einsum"):
        layer[1].apply(layer[2], drawn(B, N, E))


def test_promotion() -> None:
    x = drawn(B, N, H, 4)
    half = x.astype(jnp.bfloat16)
    want = linen.dot_product_attention(x, half, half)
    close(attention_fn()(x, half, half), want)

    def kept(arrays: Any, *, dtype: Any) -> Any:
        assert dtype is None
        return arrays

    with pytest.raises(TypeError, match="k: got dtype bfloat16, expected float32"):
        attention_fn()(x, half, half, promote_dtype=kept)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("sofmax", SpecError, "did you mean 'softmax'"),
        ("bn(beta=param)", UnsupportedError, "spec: .* takes the arrays beta"),
        ("bn(statistics=running)", UnsupportedError, "spec: .* takes the arrays mean, var"),
        ("bn(statistics=running,with_std=false)", UnsupportedError, "takes the arrays mean"),
    ],
)
def test_specs_that_do_not_fit(spec: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        attention_fn(spec)


def test_shapes_are_checked() -> None:
    x = drawn(B, N, H, 4)
    with pytest.raises(ValueError, match=r"key: got shape \(6, 4\), expected \(\*batch"):
        attention_fn()(x, x[0, :, 0], x)
    with pytest.raises(ValueError, match=r"mask: got shape \(3, 1, 6, 5\), expected one that"):
        attention_fn()(x, x, x, mask=jnp.ones((B, 1, N, 5)))
    with pytest.raises(ValueError, match=r"mask: got shape \(1, 3, 1, 6, 6\), expected one that"):
        attention_fn("bn")(x, x, x, mask=jnp.ones((1, B, 1, N, N)))
    with pytest.raises(ValueError, match="2 scales"):
        attention_fn("sh(1,2)")(x, x, x)


def test_one_function_fits_layers_of_any_number_of_heads() -> None:
    for heads, written in ((1, "sh(1)"), (2, "sh(1,2)"), (3, "sh(1,1,2)")):
        x = drawn(B, N, heads, 4)
        close(attention_fn("bn+sh(half=2)")(x, x, x), attention_fn(f"bn+{written}")(x, x, x))


# --- masks and statistics -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["bn", "sh(1,1,2,2)"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_that_may_be_causal_is_refused(spec: str, compiled: bool) -> None:
    x = drawn(B, N, H, 8)
    fn = attention_fn(spec)
    run = jax.jit(fn) if compiled else fn
    for mask in (causal(N), nnx.make_causal_mask(jnp.ones((B, N))), jnp.ones((N, N))):
        with pytest.raises(UnsupportedError, match=r"mask: got shape .* may be causal"):
            run(x, x, x, mask=mask)
    run(x, x, x, mask=jnp.ones((1, N)))
    if "bn" in spec:
        with pytest.raises(UnsupportedError, match=r"is_causal: .*is computed from keys"):
            fn(x, x, x, is_causal=True)
    if spec == "bn":
        with pytest.raises(UnsupportedError, match=r"bias: got shape .* may hide the future"):
            run(x, x, x, bias=jnp.where(causal(N), 0.0, -jnp.inf))
        run(x, x, x, bias=drawn(B, H, 1, N))


@pytest.mark.parametrize("spec", ["bn+sh(1,1,2,2)"])
def test_a_mask_that_is_declared_as_padding(spec: str) -> None:
    fn, plain = attention_fn(spec, padding=True), attention_fn(spec)
    x, padding = drawn(B, N, H, 8), real([6, 4, 1], N)
    mask = nnx.make_attention_mask(padding, padding)
    want = plain(x, x, x, mask=padding[:, None, None])
    for run in (fn, jax.jit(fn)):
        got = run(x, x, x, mask=mask)
        close(
            jnp.where(padding[..., None, None], got, 0.0),
            jnp.where(padding[..., None, None], want, 0.0),
        )
        assert not got[1, 4:].any()
        close(run(x, x, x, mask=padding[:, None, None]), want)


def test_a_false_declaration_gives_no_number() -> None:
    fn = attention_fn("bn", padding=True)
    x = drawn(B, N, H, 8)
    lies = jnp.stack([jnp.ones((1, N, N), bool), causal(N)[None], jnp.ones((1, N, N), bool)])
    with pytest.raises(ValueError, match="mask: queries of one sequence see other keys"):
        fn(x, x, x, mask=lies)
    got = jax.jit(fn)(x, x, x, mask=lies)
    assert jnp.isnan(got).any((1, 2, 3)).tolist() == [False, True, False]
    assert jnp.isnan(got[1]).all()
    heads = jnp.ones((B, H, 1, N), bool).at[2, 1, 0, 3].set(False)
    assert jnp.isnan(jax.jit(fn)(x, x, x, mask=heads)).any((1, 2, 3)).tolist() == [
        False,
        False,
        True,
    ]


def test_the_future_is_seen_only_by_permission() -> None:
    x = drawn(1, N, H, 8)
    other = x.at[:, -1].add(1.0)
    fn = attention_fn("bn(allow_leak=true)")
    options = {"mask": causal(N)}
    assert not np.allclose(fn(x, x, x, **options)[:, 2], fn(x, other, other, **options)[:, 2])
    for spec in CAUSAL:
        for options in ({"mask": causal(N)}, {"is_causal": True}):
            fn = jax.jit(attention_fn(spec), static_argnames="is_causal")
            got, want = fn(x, other, other, **options), fn(x, x, x, **options)
            close(got[:, :-1], want[:, :-1], tolerance=0.0)
            assert not np.allclose(got[:, -1], want[:, -1]) or "sh(1,1,2,2)" in spec


@pytest.mark.parametrize("spec", CAUSAL)
def test_a_causal_mask_and_padding_in_one(spec: str) -> None:
    """Check the mask that every model of Flax makes: the statistics are over the real keys."""
    x, padding = drawn(B, N, H, 8), real([6, 4, 1], N)
    mask = nnx.combine_masks(
        nnx.make_causal_mask(padding), nnx.make_attention_mask(padding, padding)
    )
    got = jax.jit(attention_fn(spec))(x, x, x, mask=mask)
    want = pdcore.attention(
        *[np.swapaxes(np.asarray(x), 1, 2)] * 3, spec, key_mask=np.asarray(padding)
    )
    shown = np.asarray(padding)[..., None, None]
    want = np.where(shown, np.swapaxes(want, 1, 2), 0.0)
    np.testing.assert_allclose(np.where(shown, got, 0.0), want, rtol=0.0, atol=5e-6)


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*CAUSAL, PREFIX, "causal+linear", "causal+sh(1,1,2,2)"])
def test_nnx_decoding_equals_the_whole_sequence(spec: str) -> None:
    layer = nnx_pair(spec)[1]
    x = drawn(B, N, E)
    want = layer(x)
    layer.init_cache((B, M, E))  # longer than the sequence decoded

    @nnx.jit
    def step(layer: Any, x: Any) -> Any:
        return layer(x, decode=True)

    got = jnp.concatenate([step(layer, x[:, i : i + 1]) for i in range(N)], 1)
    close(got, want, tolerance=5e-6)


@pytest.mark.parametrize(
    ("spec", "eager"),
    [(PREFIX, True), (f"{PREFIX}+sh(1,1,2,2)", False), ("causal+sparse(2,0)", False)],
)
def test_nnx_decodes_padded_sequences(spec: str, eager: bool) -> None:
    """Check padding on the left, in the mask of every step."""
    layer = nnx_pair(spec)[1]
    x = drawn(B, N, E)
    padding = jnp.arange(N) >= jnp.asarray([0, 2, 4])[:, None]
    want = layer(x, mask=nnx.combine_masks(nnx.make_causal_mask(padding), padding[:, None, None]))
    layer.init_cache((B, M, E))
    mask = jnp.pad(padding, ((0, 0), (0, M - N)), constant_values=True)[:, None, None]
    step = nnx.jit(lambda layer, x: layer(x, mask=mask, decode=True))
    run = (lambda layer, x: layer(x, mask=mask, decode=True)) if eager else step
    got = jnp.concatenate([run(layer, x[:, i : i + 1]) for i in range(N)], 1)
    shown = padding[..., None]
    close(jnp.where(shown, got, 0.0), jnp.where(shown, want, 0.0), tolerance=5e-6)


def test_softmax_decodes_as_flax_does() -> None:
    plain, ours = nnx_pair()
    x = drawn(B, N, E)
    for layer in (plain, ours):
        layer.init_cache((B, M, E))
    for i in range(N):
        step = x[:, i : i + 1]
        close(ours(step, decode=True), plain(step, decode=True))


@pytest.mark.parametrize("spec", [f"{PREFIX}+sh(1,1,2,2)"])
def test_linen_decoding_equals_the_whole_sequence(spec: str) -> None:
    _, layer, variables = linen_pair(spec)
    x = drawn(B, N, E)
    want = layer.apply(variables, x)
    decoder = linen.MultiHeadDotProductAttention(H, attention_fn=attention_fn(spec), decode=True)
    cache = decoder.init(jax.random.key(0), jnp.ones((B, M, E)))["cache"]

    @jax.jit
    def step(cache: Any, x: Any) -> Any:
        return decoder.apply({**variables, "cache": cache}, x, mutable=["cache"])

    for i in range(N):
        got, changed = step(cache, x[:, i : i + 1])
        cache = changed["cache"]
        close(got, want[:, i : i + 1], tolerance=5e-6)


def test_is_causal_in_decoding() -> None:
    layer = nnx_pair()[1]
    x = drawn(B, N, E)
    want = layer(x, is_causal=True)
    layer.init_cache((B, M, E))
    for i in range(N):
        close(layer(x[:, i : i + 1], decode=True, is_causal=True), want[:, i : i + 1])


def test_positions_that_are_not_known_are_refused() -> None:
    q, k = drawn(B, 2, H, 8), drawn(B, M, H, 8)
    for spec in CAUSAL:
        with pytest.raises(UnsupportedError, match=r"got 2 queries for 9 keys, and .* goes"):
            attention_fn(spec)(q, k, k)
        with pytest.raises(UnsupportedError, match="got 1 queries for 9 keys without a mask"):
            attention_fn(spec)(q[:, :1], k, k)
    with pytest.raises(UnsupportedError, match="softmax with is_causal goes by position"):
        attention_fn()(q, k, k, is_causal=True)
    assert attention_fn("bn")(q, k, k).shape == q.shape


# --- as a value -----------------------------------------------------------------------------------


def test_equal_functions_are_one_structure() -> None:
    one, same = attention_fn("bn"), attention_fn("softmax + bn")
    assert one == same
    assert hash(one) == hash(same)
    assert one != attention_fn("softmax")
    assert one != attention_fn("bn", padding=True)
    assert one != attention_fn("bn", backend="jax")
    assert attention_fn(backend=["strict", "jax"]) == attention_fn(backend=("strict", "jax"))
    assert nnx.graphdef(nnx_pair("bn")[1]) == nnx.graphdef(nnx_pair("bn")[1])
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # noqa: S301 - pickled here
        assert again == one
        assert str(again.spec) == "softmax+bn"
    assert repr(attention_fn("bn", padding=True)) == (
        "<pdcore attention_fn('softmax+bn', padding=True)>"
    )


def test_the_backend_is_settled() -> None:
    x = drawn(B, N, H, 4)
    with pdcore.use_backend("jax"):
        fn = attention_fn()
    with pdcore.use_backend("strict"):
        fn(x, x, x)
        with pytest.raises((NoBackendError, UnsupportedError), match="strict"):
            jax.jit(attention_fn())(x, x, x)


def test_layers_train_together() -> None:
    """Check that a training step changes the parameters of both layers alike."""
    plain, ours = nnx_pair()
    x = drawn(B, N, E)

    @nnx.jit
    def descend(layer: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda layer: jnp.mean(jnp.square(layer(x) - 1.0)))(layer)
        state = nnx.state(layer, nnx.Param)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 0.1 * g, state, grads))
        return loss

    losses = [[descend(layer) for _ in range(3)] for layer in (ours, plain)]
    close(*losses)
    assert losses[0][2] < losses[0][0]
    close(nnx.state(ours, nnx.Param), nnx.state(plain, nnx.Param))
