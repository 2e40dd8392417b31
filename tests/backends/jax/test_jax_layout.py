"""``layout="bnhd"`` on JAX: compiled, differentiated, sharded, and for arrays of NumPy."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

import pdcore

jnp = jax.numpy
RNG = np.random.default_rng(0)


def draw() -> list[Any]:
    shapes = ((2, 8, 4, 6), (2, 8, 2, 6), (2, 8, 2, 6))
    return [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes]


def swapped(x: Any) -> Any:
    return x.swapaxes(-2, -3)


def test_a_compiled_call_and_its_gradients() -> None:
    x, layer = draw(), pdcore.bind("bn")

    def loss(*x: Any, **layout: Any) -> Any:
        out = layer(*x, **layout)
        return (out**3).sum(), out

    grad = partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    (_, out), got = jax.jit(grad(partial(loss, layout="bnhd")))(*x)
    (_, wanted), want = jax.jit(grad(loss))(*map(swapped, x))
    np.testing.assert_allclose(out, swapped(wanted), rtol=1e-5, atol=1e-6)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, swapped(b), rtol=1e-4, atol=1e-5)


def test_arrays_of_numpy_on_jax() -> None:
    x = [np.array(a) for a in draw()]
    out = pdcore.attention(*x, backend="jax", layout="bnhd")
    assert isinstance(out, np.ndarray)
    np.testing.assert_allclose(out, pdcore.attention(*x, layout="bnhd"), rtol=1e-5, atol=1e-6)


def test_shards_of_a_sequence() -> None:
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    part = jax.sharding.PartitionSpec(None, "rows")
    layer = partial(pdcore.bind("bn"), axis_name="rows", layout="bnhd")
    sharded = jax.shard_map(layer, mesh=mesh, in_specs=(part,) * 3, out_specs=part)
    x = draw()
    wanted = swapped(pdcore.attention(*map(swapped, x), "bn"))
    np.testing.assert_allclose(jax.jit(sharded)(*x), wanted, rtol=1e-5, atol=1e-6)
