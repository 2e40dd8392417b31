"""`ArrayBackend` on JAX: traceable, and with the gradients of JAX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from array_backend_cases import (
    SPECS,
    full_case,
    gradients_by_numpy,
    per_sequence,
    same_gradients,
    with_leaves,
)
from reference_cases import check_forward, cotangents, normal_case, plain_info

from pdcore.backend import ArrayBackend, Inputs
from pdcore.lowering import Plan


class Jax(ArrayBackend):
    """`ArrayBackend` on JAX."""

    info = plain_info("plain_jax", "Jax", "jax")
    query_block = 4
    key_block = 3

    @property
    def xp(self) -> Any:
        return jax.numpy


@pytest.fixture(autouse=True)
def jax_settings() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


#: What takes the time is compiling. (Level 0 gives NaN where level 1 and single operations do not.)
QUICK = {"xla_backend_optimization_level": 1}


#: With positions that are traced; and known ones, where positions matter at all.
COMPILED = [(text, True) for text in SPECS] + [
    (text, False) for text in SPECS if any(w in text for w in ("causal", "sparse", "prefix"))
]


@pytest.mark.parametrize(("text", "array_offset"), COMPILED)
@pytest.mark.sampled(2)
def test_jax_jit_and_grad(text: str, array_offset: bool) -> None:
    jnp = jax.numpy
    case = per_sequence(text) if array_offset else full_case(text)
    plan: Plan = case.plan()
    leaves = {n: jnp.asarray(x) for n, x in case.differentiable.items()}
    d_out, d_lse = cotangents(case, case.reference()[1])

    def loss(leaves: dict[str, Any], offset: Any) -> Any:
        inputs = with_leaves(case, leaves, jnp.asarray)
        if array_offset:  # traced as well
            inputs = inputs._replace(offset=offset)
        out, lse = Jax().attention(plan, inputs, lse=True)
        total = jnp.sum(out * d_out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * d_lse)
        return total, (out, lse)

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (_, (out, lse)), got = compiled(leaves, jnp.asarray(case.call["offset"]))
    assert out.dtype == lse.dtype == np.float64
    check_forward(case, out, lse)
    same_gradients(got, gradients_by_numpy(case, d_out, d_lse))


@pytest.mark.parametrize("text", ["softmax", "bn(eps=0.1)+sh(1,2)", "linear+causal"])
def test_jax_vmap_is_one_sequence_at_a_time(text: str) -> None:
    case = normal_case(text, lead=(3,), n=6, m=9)
    plan = case.plan()

    def one(q: Any, k: Any, v: Any) -> Any:
        return Jax().attention(plan, Inputs(q, k, v), lse=True)

    out, lse = jax.jit(jax.vmap(one), compiler_options=QUICK)(*map(jax.numpy.asarray, case.qkv))
    check_forward(case, out, lse)


def test_jax_recompiles_for_shapes_only() -> None:
    traces = []
    case = normal_case("causal", n=6, m=9)
    plan = case.plan()

    @jax.jit
    def call(q: Any, k: Any, v: Any, offset: Any) -> Any:
        traces.append(1)
        return Jax().attention(plan, Inputs(q, k, v, offset=offset))[0]

    x = [jax.numpy.asarray(a) for a in case.qkv]
    for offset in (0, 3, -2):
        moved = replace(case, call={"offset": offset})
        np.testing.assert_allclose(call(*x, offset), moved.reference()[0], atol=1e-12)
    assert len(traces) == 1
