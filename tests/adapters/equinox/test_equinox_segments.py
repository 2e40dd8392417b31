"""Packed sequences in layers of Equinox: the rows of a segment are those of its own call."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import pdcore
from pdcore_adapters.equinox import PDMultiheadAttention

E, H = 16, 4
IDS = pdcore.segments_from_lengths([5, 4], total=10)
RUNNING = "bn(statistics=running)"
PARTS = (slice(5), slice(5, 9))


def layer_of(spec: str, **options: Any) -> Any:
    return PDMultiheadAttention(H, E, spec=spec, key=jax.random.key(0), **options)


def drawn(*shape: int) -> Any:
    x = np.random.default_rng(0).standard_normal(shape or (10, E)).astype(np.float32)
    if not shape:
        x[9] = np.nan  # padding
    return jnp.asarray(x)


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,1,2,2)", "causal+bn(statistics=prefix)"])
def test_rows_are_those_of_the_segments(spec: str) -> None:
    layer, x = layer_of(spec), drawn()
    out = layer(x, x, x, segments=IDS)
    for part in PARTS:
        np.testing.assert_allclose(out[part], layer(*[x[part]] * 3), atol=2e-6)
    assert not np.any(out[9])  # the bias of a new layer is 0


def test_key_mask_and_a_pair_under_vmap_and_grad() -> None:
    layer, q, k = layer_of("bn"), drawn(3, 10, E), drawn(3, 7, E)
    real, ids = jnp.arange(7) != 4, (IDS, pdcore.segments_from_lengths([3, 4]))

    def loss(q: Any, k: Any, real: Any, **packed: Any) -> Any:
        call = jax.vmap(lambda q, k: layer(q, k, k, key_mask=real, **packed))
        return jnp.sum(jnp.sin(call(q, k)))

    packed = eqx.filter_jit(jax.grad(lambda q, k: loss(q, k, real, segments=ids), (0, 1)))(q, k)
    own = jax.grad(loss, (0, 1))(q[:, 5:9], k[:, 3:], real[3:])
    np.testing.assert_allclose(packed[0][:, 5:9], own[0], atol=5e-6)
    np.testing.assert_allclose(packed[1][:, 3:], own[1], atol=5e-6)


def test_running_statistics_count_each_real_key_once() -> None:
    x = drawn()
    for spec in (RUNNING, f"{RUNNING}+sh(half=2)"):
        layer, state = eqx.nn.make_with_state(layer_of)(spec, momentum=1.0)
        if "sh" in spec:
            with pytest.raises(pdcore.UnsupportedError, match=r"segments: .*running statistics"):
                layer(x, x, x, state=state, segments=IDS)
            layer = eqx.nn.inference_mode(layer)
            out, _ = layer(x, x, x, state=state, segments=IDS)
            own, _ = layer(*[x[5:9]] * 3, state=state)
            np.testing.assert_allclose(out[5:9], own, atol=2e-6)
            continue
        _, state = layer(x, x, x, state=state, segments=IDS)
        k = np.asarray(jax.vmap(layer.key_proj)(x[:9])).reshape(9, H, -1)
        kept = state.get(layer.running)
        np.testing.assert_allclose(kept["running_mean"], k.mean(0), atol=1e-6)
        np.testing.assert_allclose(kept["running_var"], k.var(0), rtol=1e-5)
