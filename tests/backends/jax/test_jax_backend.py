"""The JAX backend's own code: memory, programs, roundings, cuDNN."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import pdcore
from pdcore_conformance.judge.calls import Call
from pdcore_conformance.judge.subject import Subject


@pytest.fixture
def optimized() -> Iterator[None]:
    """Let XLA optimize, for what its optimizations decide."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("spec", ["softmax", "causal", "causal+sparse(64,0)"])
def test_gradients_keep_no_scores(optimized: None, spec: str) -> None:
    x = [jax.ShapeDtypeStruct((1, 4, 4096, 16), np.float32)] * 3
    grad = jax.grad(lambda *a: pdcore.attention(*a, spec).sum(), argnums=(0, 1, 2))
    needed = jax.jit(grad).lower(*x).compile().memory_analysis().temp_size_in_bytes
    assert needed < 4 * 4096 * 4096 * 4 / 2  # half the memory of all scores


@pytest.mark.parametrize("length", [9, 12, 13])
@pytest.mark.sampled(2)
def test_a_pooled_key_is_rounded_once(wide: None, optimized: None, length: int) -> None:
    # A single key minus itself must be exactly 0: with a variance of 0, the division by eps alone
    # would amplify a rounding error 1e5 times.
    rng = np.random.default_rng(4)
    x = [rng.standard_normal((2, 2, length, 8)) for _ in range(3)]
    spec = "causal+bn(statistics=prefix)+sh(1,3)"
    _, want = pdcore.attention(*x, spec, return_lse=True)
    _, got = pdcore.attention(*map(jax.numpy.asarray, x), spec, return_lse=True)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=5e-13)


@pytest.mark.parametrize(
    "spec",
    [
        "causal",
        "sparse(inf,8)",
        "causal+bn(statistics=prefix)",
        "causal+random_features(16,0)",
    ],
)
def test_a_program_does_not_grow_with_the_keys(spec: str) -> None:
    layer = jax.grad(lambda *a: pdcore.attention(*a, spec).sum(), argnums=(0, 1, 2))

    def lines(length: int) -> int:
        x = [jax.ShapeDtypeStruct((1, 4, length, 16), np.float32)] * 3
        return int(jax.jit(layer).lower(*x).as_text().count("\n"))

    assert lines(16384) == lines(8192) < 1.2 * lines(4096)


@pytest.mark.parametrize(
    "spec",
    [
        "causal+bn(statistics=prefix)",
        "causal+linear",
        "causal+random_features(8,0)",
    ],
)
def test_no_sequences(spec: str) -> None:
    x = jax.numpy.zeros((0, 2, 5, 4))
    assert pdcore.attention(x, x, x, spec).shape == x.shape


@pytest.mark.parametrize("length", [0, 1, 16, 37])
def test_prefix_moments_of_chunks(wide: None, length: int) -> None:
    from pdcore.spec import statistics
    from pdcore_backends.jax.prefix import prefix_states

    rng = np.random.default_rng(length)
    stats, keys = statistics.Moments(), rng.standard_normal((2, 3, length, 5))
    call = jax.jit(lambda *x: prefix_states(stats, *x))
    for mask in (None, rng.random((2, 1, length, 1)) > 0.3):
        want = statistics.prefix_states(stats, keys, mask, xp=np)
        got = call(keys, mask)
        for name, x in want.items():
            assert got[name].dtype == x.dtype
            np.testing.assert_allclose(got[name], x, atol=1e-14 * (1 + length), err_msg=name)


def test_a_bound_call_compiles() -> None:
    x = jax.numpy.ones((1, 2, 4, 3))
    layer = pdcore.bind("bn")
    np.testing.assert_allclose(jax.jit(layer)(x, x, x), layer(x, x, x), rtol=1e-6)


def test_given_statistics_are_constants() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 1, 2, 6, 4))
    params = {"mean": jax.numpy.ones((2, 4)), "var": 2 * jax.numpy.ones((2, 4))}
    grad = jax.grad(lambda p: pdcore.attention(*x, "bn(statistics=running)", params=p).sum())
    assert all((g == 0).all() for g in grad(params).values())


class Cudnn:
    """The calls to cuDNN, the reasons against other calls, and a factor of its gradients."""

    def __init__(self) -> None:
        self.causal: list[bool] = []
        self.reasons: list[str] = []
        self.slope = 1.0


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudnn]:
    """Choose as on a GPU, and let XLA compute the calls that cuDNN would run.

    The gradient is NaN where queries or keys fill a tile in part, as that of cuDNN may be.
    """
    from pdcore_backends.jax import choice, cudnn

    log, judged = Cudnn(), choice.unfit

    def attend(*arrays: Any, **options: Any) -> Any:
        log.causal.append(options["is_causal"])
        run = partial(jax.nn.dot_product_attention, implementation="xla", **options)
        whole = all(x.shape[1] % 128 == 0 for x in arrays)
        slope = log.slope if whole else math.nan
        both = jax.custom_vjp(run)

        def backward(pull: Any, d_out: Any) -> Any:
            return jax.tree.map(lambda x: slope * x, pull(d_out))

        both.defvjp(lambda *x: jax.vjp(run, *x), backward)
        return both(*arrays)

    def unfit(*arguments: Any) -> str:
        log.reasons.append(judged(*arguments))
        return log.reasons[-1]

    jax.clear_caches()
    monkeypatch.setattr(choice, "_missing", lambda device: "")
    monkeypatch.setattr(cudnn, "_attend", attend)
    monkeypatch.setattr(choice, "unfit", unfit)
    yield log
    jax.clear_caches()


def halves(rows: int = 128, keys: int = 128) -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    shapes = (1, 4, rows, 8), (1, 2, keys, 8), (1, 2, keys, 8)
    return tuple(jax.numpy.asarray(rng.standard_normal(s), jax.numpy.bfloat16) for s in shapes)


@pytest.mark.parametrize(
    ("spec", "rows", "keys"),
    [
        ("softmax", 128, 128),
        ("softmax", 129, 1),
        ("bn", 128, 192),
        ("causal", 128, 128),
        ("causal", 192, 192),
        ("sh(1,2)", 128, 128),
        ("cosine(2.0)", 128, 128),
    ],
)
def test_what_cudnn_computes(cudnn: Cudnn, spec: str, rows: int, keys: int) -> None:
    from pdcore_conformance.judge.budget import expect, judge

    x = halves(rows, keys)
    out, pull = jax.vjp(pdcore.bind(spec), *x)
    assert set(cudnn.causal) == {spec == "causal"}
    wanted = expect(*map(np.asarray, x), spec)
    assert judge({"out": np.asarray(out)}, wanted)["out"].ok
    assert all(np.isfinite(np.asarray(d, np.float32)).all() for d in pull(jax.numpy.ones_like(out)))


@pytest.mark.parametrize(
    ("rows", "keys", "whole"), [(128, 256, True), (128, 192, False), (130, 128, False)]
)
def test_cudnn_computes_gradients_of_whole_tiles_alone(
    cudnn: Cudnn, rows: int, keys: int, whole: bool
) -> None:
    cudnn.slope = math.nan
    q, k, v = halves(rows, keys)
    grad = np.asarray(jax.grad(lambda v: pdcore.attention(q, k, v).sum())(v), np.float32)
    assert cudnn.causal
    assert np.isnan(grad).all() if whole else np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("spec", "more", "why"),
    [
        ("softmax", {"key_mask": np.ones((1, 128), bool)}, "key_mask may leave a row"),
        ("softmax", {"return_lse": True}, "the log-sum-exp is needed"),
        ("sparse(3,3)", {}, "a window"),
        ("gaussian(0.3)", {}, "no exp of an inner product"),
        ("bn(statistics=prefix)+causal", {}, "16 bit may not hold"),
        ("softmax+h(count)", {}, "the log-sum-exp is needed"),
        ("causal+sh(1,2)", {}, "pooled keys under causal"),
        ("causal", {"offset": 3}, None),
    ],
)
def test_what_cudnn_does_not_get(cudnn: Cudnn, spec: str, more: Any, why: str | None) -> None:
    arrays = {n: jax.numpy.asarray(x) if n == "key_mask" else x for n, x in more.items()}
    result = pdcore.bind(spec)(*halves(), **arrays)
    assert cudnn.causal == []
    assert (why or "") in cudnn.reasons[-1]
    assert bool(cudnn.reasons[-1]) == (why is not None)
    assert all(not jax.numpy.isnan(x).any() for x in jax.tree.leaves(result))


@pytest.mark.parametrize("rows", [1, 4, 127])
def test_decoding_builds_no_plan_of_cudnn(cudnn: Cudnn, rows: int) -> None:
    for keys in (127, 128):
        pdcore.attention(*halves(rows, keys))
    assert cudnn.causal == []
    assert "fewer than 128 queries, as in decoding" in cudnn.reasons[-1]


def test_explain_names_the_kernel() -> None:
    x = jax.numpy.ones((1, 2, 4, 3))
    assert "blocks of rows and keys" in str(pdcore.explain(x, x, x, "softmax"))


@pytest.mark.parametrize("spec", ["conv1d", "conv1d(5,padding=causal)+causal", "conv2d(2,3)"])
@pytest.mark.sampled(2)
def test_default_parameters_under_transformations(spec: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (
        jax.numpy.asarray(x, dtype=jax.numpy.float32) for x in rng.standard_normal((3, 2, 2, 6, 4))
    )
    size = {"conv1d": (3,), "conv2d(2,3)": (3, 3)}.get(spec, (5,))
    weight = jax.numpy.full((2, *size, 4), 1.0 / math.prod(size))

    def call(q, k, v, **more):
        return pdcore.attention(q, k, v, spec, **more)

    def total(q, **more):
        return call(q, k, v, **more).sum()

    want = call(q, k, v, params={"weight": weight})
    for mapped in (jax.jit(call), jax.vmap(call), jax.jit(jax.vmap(call))):
        np.testing.assert_allclose(mapped(q, k, v), want, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda q: total(q, params={"weight": weight}))(q)
    for derived in (jax.grad(total), jax.jit(jax.grad(total))):
        np.testing.assert_allclose(derived(q), gradient, rtol=1e-4, atol=1e-5)
    weights = jax.jit(lambda *x: pdcore.attention_weights(*x, spec))(q, k, v)
    np.testing.assert_allclose(weights @ v, want, rtol=1e-4, atol=1e-5)


def test_arrays_of_numpy_in_every_layout() -> None:
    file = Path(__file__).parents[2] / "shared" / "layouts.py"
    run = subprocess.run([sys.executable, str(file), "jax"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout.splitlines()[-1:] + run.stderr.splitlines()[-5:]


def test_a_random_key_is_no_array_of_numbers() -> None:
    key, x = jax.random.key(0), jax.numpy.ones((1, 1, 2, 4))
    with pytest.raises(TypeError, match=r"q: got dtype key.*expected one of float16"):
        pdcore.attention(jax.random.split(key, (1, 1, 2, 4)), x, x)


def test_the_shift_of_keys_leaves_lse_alone() -> None:
    # The shift that XLA computed twice, by minima and maxima, did not cancel in lse.
    call = Call(
        spec="iebn(allow_leak=true)+causal",
        dtype="float16",
        lead=(1,),
        rows=6,
        keys=12,
        dim=5,
        value_dim=2,
        mask="sequences",
        bias="inf",
        offset=2,
        draw="constant",
        seed=6,
    )
    Subject("jax").judge(call)
