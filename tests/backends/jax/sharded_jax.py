"""Attention on arrays that are sharded over several CPU devices.

`test_jax_sharding.py` runs these tests in a separate process, because the number of JAX's CPU
devices must be set before JAX is first used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from shard_cases import CASES, Case, agree, single

import pdcore
from pdcore.backend import Inputs
from pdcore.plugins import load_backend
from pdcore_conformance.judge.budget import expect, judge

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

HEADS, ROWS, VECTORS = P("data", "model"), P(None, None, "seq"), P(None, "seq")
SEQUENCE = Mesh(jax.devices()[:4], ("seq",), axis_types=(AxisType.Auto,))
GRID = Mesh(
    np.reshape(jax.devices()[:4], (2, 2)), ("data", "model"), axis_types=(AxisType.Auto,) * 2
)
COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\("
)


def sharded(case: Case, mesh: Mesh = SEQUENCE) -> dict[str, Any]:
    """Run a call in shards, and pull cotangents back."""
    inputs = case.arrays()
    known = {name: inputs.pop(name) for name in ("offset", "dropout", "seed") if name in inputs}
    if isinstance(known["offset"], np.ndarray):
        inputs["offset"] = known.pop("offset")
    whole = {"params", "offset"}

    def local(inputs: dict[str, Any]) -> Any:
        return pdcore.attention(spec=case.spec, axis_name="seq", return_lse=True, **inputs, **known)

    split = {
        name: P() if name in whole else VECTORS if name == "key_mask" else ROWS for name in inputs
    }
    run = jax.shard_map(local, mesh=mesh, in_specs=(split,), out_specs=ROWS)
    moving = {name: inputs[name] for name in ("q", "k", "v")}
    if {"beta", "sink", "relative"} & set(case.extras):
        moving["params"] = inputs["params"]

    @jax.jit
    def both(moving: Any, cotangents: Any) -> Any:
        (out, lse), pull = jax.vjp(lambda x: run({**inputs, **x}), moving)
        d_out, d_lse = cotangents
        [d] = pull((d_out, jnp.where(jnp.isinf(lse), 0.0, d_lse).astype(lse.dtype)))
        return out, lse, d

    out, lse, d = both(moving, case.cotangents())
    params = d.pop("params", {})
    grads = {f"d_{name}": np.asarray(x) for name, x in {**d, **params}.items()}
    return {"out": np.asarray(out), "lse": np.asarray(lse), **grads}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: "-".join(map(str, (case.spec, *case.extras))),
)
def test_shards_give_what_the_whole_gives(case: Case) -> None:
    agree(sharded(case), single(case), 1e-12)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spec", ["causal+bn(statistics=prefix,eps=0.1)", "softmax"])
def test_shards_give_what_one_device_gives(spec: str) -> None:
    case = Case(spec)
    agree(sharded(case), single(case, jnp.asarray), 1e-12)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spec", ["causal+bn(statistics=prefix)", "softmax", "bn"])
def test_float32_keeps_the_budget(spec: str) -> None:
    case = Case(spec, ("key_mask",), dtype="float32")
    d_out, d_lse = case.cotangents()
    expected = expect(spec=spec, d_out=d_out, d_lse=d_lse, **case.arrays())
    assert all(verdict.ok for verdict in judge(sharded(case), expected).values())


def test_statistics_of_a_large_mean() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (100 + 0.1 * rng.standard_normal((3, 1, 2, 4096, 8))).astype(np.float32)
    run = jax.shard_map(
        lambda *x: pdcore.attention(*x, "bn", axis_name="seq"),
        mesh=SEQUENCE,
        in_specs=ROWS,
        out_specs=ROWS,
    )
    expected = expect(q[..., :64, :], k, v, "bn")
    results = {"out": np.asarray(jax.jit(run)(q, k, v))[..., :64, :]}
    assert all(verdict.ok for verdict in judge(results, expected).values())


def test_second_derivatives() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 1, 1, 8, 2), dtype=np.float64)
    t = jax.random.normal(jax.random.key(1), x.shape, dtype=np.float64)
    spec, split = "causal", P(None, None, None, "seq")

    def loss(x: Any, **more: Any) -> Any:
        return pdcore.attention(*x, spec, **more)

    cut = jax.shard_map(
        lambda x: loss(x, axis_name="seq"), mesh=SEQUENCE, in_specs=split, out_specs=ROWS
    )
    slope, wanted = (jax.jit(along(lambda x, f=f: (f(x) ** 2).sum()))(x, t) for f in (cut, loss))
    np.testing.assert_allclose(slope, wanted, rtol=1e-9, atol=1e-9 * float(abs(wanted).max()))


def along(loss: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the directional derivative of the gradient of a loss."""
    return lambda x, t: jax.jvp(jax.grad(loss), (x,), (t,))[1]


@pytest.mark.parametrize(
    "spec", ["causal", "causal+bn(statistics=prefix)", "causal+random_features(8,0)"]
)
def test_a_derivative_keeps_no_empty_arrays(spec: str) -> None:
    # XLA of JAX 0.11.2 ends the process where a derivative of shards keeps one. The 6 keys of a
    # shard are one chunk, after which there is nothing to scan.
    x = jax.ShapeDtypeStruct((1, 2, 24, 4), np.float32)
    run = jax.shard_map(
        lambda *x: pdcore.attention(*x, spec, axis_name="seq"),
        mesh=SEQUENCE,
        in_specs=ROWS,
        out_specs=ROWS,
    )
    text = jax.jit(jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1, 2))).lower(x, x, x).as_text()
    kept = re.findall(r"manual_axes=\S+ \((.*?)\) \{", text)
    assert len(kept) > 1
    assert not re.findall(r"tensor<(?:\d+x)*0x\S*", " ".join(kept))


def test_memory_is_linear_in_the_shard() -> None:
    def needed(length: int, shards: int) -> int:
        mesh = Mesh(jax.devices()[:shards], ("seq",))
        x = jax.ShapeDtypeStruct(
            (1, 8, length * shards, 64), np.float32, sharding=NamedSharding(mesh, ROWS)
        )
        run = jax.shard_map(
            lambda *x: pdcore.attention(*x, axis_name="seq"),
            mesh=mesh,
            in_specs=ROWS,
            out_specs=ROWS,
        )
        grad = jax.jit(jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1, 2)))
        return int(grad.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes)

    local = needed(1024, 4)
    assert needed(4096, 4) < 4.2 * local
    # Keeping keys and values of every step for the gradient would take 16 MiB more.
    assert needed(1024, 8) < local + (1 << 22)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("spec", "split"),
    [
        ("softmax", HEADS),
        ("causal", HEADS),
        ("bn", HEADS),
        ("causal+bn(statistics=prefix)", HEADS),
        ("linear", HEADS),
        ("causal+linear", HEADS),
        ("bn+sh(1,1,2,2)", P(("data", "model"))),
    ],
)
def test_batch_and_heads_need_no_collectives(spec: str, split: Any) -> None:
    rng = np.random.default_rng(3)
    place = NamedSharding(GRID, split)
    shapes = ((4, 8, 70, 8), (4, 4, 70, 8), (4, 4, 70, 8))
    x = [rng.standard_normal(shape) for shape in shapes]
    d_out = rng.standard_normal(shapes[0])
    there = [jax.device_put(a, place) for a in (*x, d_out)]
    layer = pdcore.bind(spec)

    def both(q: Any, k: Any, v: Any, d: Any) -> Any:
        out, pull = jax.vjp(layer, q, k, v)
        return out, *pull(d)

    compiled = jax.jit(both, out_shardings=place).lower(*there).compile()
    assert not COLLECTIVE.findall(compiled.as_text())
    out, _, pull = pdcore.attention_vjp(*x, spec)
    for got, want in zip(compiled(*there), (out, *pull(d_out).values()), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12 * abs(want).max())


def test_the_pattern_finds_collectives() -> None:
    place, everywhere = NamedSharding(GRID, HEADS), NamedSharding(GRID, P())
    x = jax.device_put(np.ones((4, 4, 8, 8)), place)
    compiled = jax.jit(lambda x: x * 2, out_shardings=everywhere).lower(x).compile()
    assert COLLECTIVE.findall(compiled.as_text())


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        ("softmax", {"collective-permute"}),
        ("bn", {"collective-permute", "all-gather"}),
        ("linear", {"all-reduce"}),
    ],
)
def test_no_keys_are_gathered(spec: str, kinds: set[str]) -> None:
    # What is gathered is the states of the statistics: n, mean and m2 of 4 shards and 2 heads.
    run = jax.shard_map(
        lambda *x: pdcore.attention(*x, spec, axis_name="seq"),
        mesh=SEQUENCE,
        in_specs=ROWS,
        out_specs=ROWS,
    )
    x = [jax.device_put(np.ones((1, 2, 24, 4)), NamedSharding(SEQUENCE, ROWS))] * 3
    text = jax.jit(run).lower(*x).compile().as_text()
    assert set(COLLECTIVE.findall(text)) == kinds
    gathers = [line.split("all-gather(")[0] for line in text.splitlines() if "all-gather(" in line]
    shapes = [s for line in gathers for s in re.findall(r"f64\[([\d,]*)\]", line)]
    sizes = [math.prod(map(int, s.split(","))) for s in shapes]
    assert all(0 < size <= 4 * 2 * 4 for size in sizes)


@pytest.mark.parametrize(
    ("spec", "more", "words"),
    [
        ("sh(1,4)", {}, "6 keys in a shard are no multiple of the scale 4"),
        ("softmax", {"mask": np.ones((1, 1), bool)}, "mask has entries for pairs"),
        ("softmax", {"bias": np.zeros((1, 1))}, "bias has entries for pairs"),
        ("causal+linear", {"offset": 3}, "offset: got 3, expected 0"),
        ("causal+linear", {"offset": np.array(1)}, "causal features with an offset"),
        ("bn(statistics=prefix)", {"rows": 12}, "3 queries and 6 keys in a shard"),
    ],
)
def test_what_cannot_be_cut_is_refused(spec: str, more: dict[str, Any], words: str) -> None:
    options = dict(more)
    arrays = Case(spec, rows=options.pop("rows", 24)).arrays()
    x = [arrays[name] for name in ("q", "k", "v")]
    more = {n: jnp.asarray(a) if isinstance(a, np.ndarray) else a for n, a in options.items()}

    def call(q: Any, k: Any, v: Any) -> Any:
        return pdcore.attention(q, k, v, spec, axis_name="seq", backend="jax", **more)

    run = jax.shard_map(call, mesh=SEQUENCE, in_specs=ROWS, out_specs=ROWS)
    with pytest.raises(pdcore.UnsupportedError, match=re.escape(words)):
        run(*x)
    if not isinstance(more.get("offset"), int):
        local = (a[..., : a.shape[-2] // 4, :] for a in x)
        explanation = pdcore.explain(*map(jnp.asarray, local), spec, axis_name="seq", **more)
        assert words in " ".join(explanation.reasons["jax"])
        assert explanation.backend is None


def test_only_attention_runs_in_shards() -> None:
    x = jnp.ones((1, 2, 4, 3))
    backend, plan = load_backend("jax"), pdcore.explain(x, x, x, axis_name="seq").plan
    for method in (backend.attention_vjp, backend.attention_weights):
        with pytest.raises(pdcore.UnsupportedError, match="only attention runs in shards"):
            method(plan, Inputs(x, x, x, axis_name="seq"))


def test_an_unknown_axis_is_named() -> None:
    x = jnp.ones((1, 2, 4, 3))
    with pytest.raises(ValueError, match="axis_name: got 'rows', expected the name of a mapped"):
        pdcore.attention(x, x, x, axis_name="rows")


def test_explain_says_what_shards_exchange() -> None:
    x = jnp.ones((1, 2, 4, 3))
    for spec, words in {
        "bn": "never a mean of means",
        "causal": "a ring of ppermute",
        "linear": "the sum over shards of",
        "causal+linear": "an exclusive scan",
    }.items():
        assert words in str(pdcore.explain(x, x, x, spec, axis_name="seq"))
        assert "shards" not in str(pdcore.explain(x, x, x, spec))
