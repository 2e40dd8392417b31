"""Packed sequences in layers of Flax: the rows of a segment are those of its own call."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax import numpy as jnp

import pdcore
from pdcore_adapters.flax import LinenSpecAttention, PackedMask, SpecAttention, attention_fn

E, H = 16, 4
IDS = np.stack([pdcore.segments_from_lengths([5, 4], total=10)] * 2)
RUNNING = "bn(statistics=running)"


def drawn(*shape: int) -> Any:
    x = np.random.default_rng(0).standard_normal(shape or (2, 10, E)).astype(np.float32)
    if not shape:
        x[:, 9] = np.nan  # padding
    return jnp.asarray(x)


def nnx_layer(attend: Any) -> Any:
    return nnx.MultiHeadAttention(H, E, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))


def check_rows(call: Any, x: Any) -> None:
    """Compare ``call(x, mask)`` with separate calls, and the row of padding with zeros."""
    out = call(x, PackedMask(IDS))
    for part in (slice(5), slice(5, 9)):
        np.testing.assert_allclose(out[:, part], call(x[:, part], None), atol=2e-6)
    assert not np.any(out[:, 9])  # the bias of a new layer is 0


@pytest.mark.parametrize(
    "spec", ["softmax", "bn+sh(1,1,2,2)", "causal+bn(statistics=prefix)", "causal+alibi"]
)
def test_rows_are_those_of_the_segments(spec: str) -> None:
    layer = nnx_layer(attention_fn(spec))
    check_rows(lambda x, mask: layer(x, mask=mask), drawn())


@pytest.mark.parametrize("kind", [SpecAttention, LinenSpecAttention])
def test_rows_of_a_module_are_those_of_the_segments(kind: Any) -> None:
    spec, x = "iebn(beta=param)", drawn()
    if kind is SpecAttention:
        layer = nnx_layer(SpecAttention(spec, H, E // H))
        check_rows(lambda x, mask: layer(x, mask=mask), x)
    else:
        module = linen.MultiHeadDotProductAttention(H, attention_fn=LinenSpecAttention(spec))
        variables = module.init(jax.random.key(0), x)
        check_rows(lambda x, mask: module.apply(variables, x, mask=mask), x)


def test_the_argument_is_the_mask_and_may_be_a_pair() -> None:
    q, k = drawn(2, 10, H, 4), drawn(2, 7, H, 4)
    pair = (IDS, np.stack([pdcore.segments_from_lengths([3, 4])] * 2))
    attend = attention_fn("bn")
    out = attend(q, k, k, segments=pair)
    np.testing.assert_array_equal(out, attend(q, k, k, mask=PackedMask(pair)))
    np.testing.assert_allclose(out[:, 5:9], attend(q[:, 5:9], k[:, 3:], k[:, 3:]), atol=2e-6)
    with pytest.raises(TypeError, match="PackedMask beside segments="):
        attend(q, k, k, mask=PackedMask(pair), segments=pair)


def test_a_mask_holds_in_each_segment() -> None:
    """A key that no query of its own segment sees is padding, whatever other segments see."""
    x, ids = drawn(2, 9, H, 4), IDS[:, :9]
    mask = np.ones((2, 1, 9, 9), bool)
    mask[..., :5, 3] = False
    attend = attention_fn("bn", padding=True)
    out = attend(x, x, x, mask=PackedMask(ids, mask))
    own = attend(*[x[:, :5]] * 3, mask=mask[..., :5, :5])
    np.testing.assert_allclose(out[:, :5], own, atol=2e-6)
    together = mask & (ids[:, None, :, None] == ids[:, None, None, :])
    np.testing.assert_array_equal(attend(x, x, x, mask=PackedMask(ids, together)), out)
    with pytest.raises(ValueError, match="hide padding only"):
        attend(x, x, x, mask=PackedMask(ids, nnx.make_causal_mask(ids)))


def test_weights_are_sown() -> None:
    q = drawn(2, 9, H, 4)
    attend, packed = attention_fn("bn"), PackedMask(IDS[:, :9])

    class Layer(nnx.Module):
        def __call__(self, q: Any) -> Any:
            return attend(q, q, q, mask=packed, module=self)

    _, sown = nnx.capture(Layer(), nnx.Intermediate)(q)
    [weights] = jax.tree.leaves(sown)
    assert weights.shape == (2, H, 9, 9)
    assert not np.any(weights[:, :, :5, 5:])


def test_running_statistics_count_each_real_key_once() -> None:
    layer = nnx_layer(SpecAttention(RUNNING, H, E // H, momentum=1.0))
    x = drawn()
    nnx.jit(lambda layer, x: layer(x, mask=PackedMask(IDS)))(layer, x)
    k = np.asarray(layer.key(x[:, :9]))
    kept = layer.attention_fn
    np.testing.assert_allclose(kept.running_mean[...], k.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(kept.running_var[...], k.var((0, 1)), rtol=1e-5)
    pooled = nnx_layer(SpecAttention(f"{RUNNING}+sh(half=2)", H, E // H))
    with pytest.raises(pdcore.UnsupportedError, match=r"segments: .*running statistics"):
        pooled(x, mask=PackedMask(IDS))
    pooled.eval()
    check_rows(lambda x, mask: pooled(x, mask=mask), x)
