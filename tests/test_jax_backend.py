"""The JAX backend's own code: blocks, derivatives, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pdcore

pytestmark = pytest.mark.jax
jax: Any = pytest.importorskip("jax")

SPECS = [
    "softmax", "causal", "sparse(5,3)", "causal+sparse(20,0)", "bn", "gaussian(0.3)",
    "polynomial(2,1.0)+h(count)", "exponential(softcap=5.0)", "sh(1,2)", "causal+sh(1,2)",
    "random_features(32,0)+sparse(9,9)", "linear+sparse(4,4)",
]  # fmt: skip
GIVEN = ["nothing", "key_mask", "mask", "offset", "bias"]
CUTS = [(True, 16, 32), (False, 16, 32), (True, 32, 1000)]


@pytest.fixture
def wide() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Force blocks of a size on what is compiled from now on."""
    from pdcore_backends.jax import blocks, scores

    def force(mapped: bool, rows: int, keys: int) -> None:
        jax.clear_caches()
        sizes = blocks.Sizes(mapped, rows, keys)
        monkeypatch.setattr(scores, "sizes", lambda *a, **k: sizes)

    yield force
    jax.clear_caches()


def arrays(given: str, group: int = 2) -> tuple[list[Any], dict[str, Any]]:
    """Make arrays of lengths that no block divides, of two key heads."""
    rng = np.random.default_rng(0)
    shapes = (2, 2 * group, 77, 8), (2, 2, 93, 8), (2, 2, 93, 5)
    q, k, v = (rng.standard_normal(s) for s in shapes)
    if given == "key_mask":
        return [q, k, v], {"key_mask": rng.random((2, 93)) > 0.3}
    if given == "mask":
        return [q, k, v], {"mask": rng.random((2, 1, 77, 93)) > 0.3}
    if given == "offset":
        return [q, k, v], {"offset": np.array([3, -2])}
    if given == "bias":
        return [q, k, v], {"bias": rng.standard_normal((2 * group, 1, 93))}
    return [q, k, v], {}


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_every_cut_gives_the_same(wide: None, cut: Any, spec: str, sizes: Any) -> None:
    cut(*sizes)
    rng = np.random.default_rng(1)
    given = GIVEN[(SPECS.index(spec) + CUTS.index(sizes)) % 4]
    # A key head of one query head has its own way.
    x, more = arrays(given, group=2 if sizes == CUTS[0] else 1)
    out, lse, pull = pdcore.attention_vjp(*x, spec, **more)
    d_out = rng.standard_normal(out.shape)
    d_lse = np.where(np.isinf(lse), 0.0, rng.standard_normal(lse.shape))
    want = pull(d_out, d_lse)
    there = {name: jax.numpy.asarray(a) for name, a in more.items()}
    got, level, back = pdcore.attention_vjp(*map(jax.numpy.asarray, x), spec, **there)
    np.testing.assert_allclose(got, out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(level, lse, rtol=1e-12, atol=1e-12)
    found = back(jax.numpy.asarray(d_out), jax.numpy.asarray(d_lse))
    for name, d in want.items():
        np.testing.assert_allclose(found[name], d, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("spec", ["softmax", "causal"])
def test_a_bias_gets_its_gradient(wide: None, cut: Any, spec: str) -> None:
    cut(True, 16, 32)
    x, more = arrays("bias")
    out, _, pull = pdcore.attention_vjp(*x, spec, **more)
    want = pull(np.ones_like(out))["bias"]
    there = jax.numpy.asarray(more["bias"])
    got, _, back = pdcore.attention_vjp(*map(jax.numpy.asarray, x), spec, bias=there)
    np.testing.assert_allclose(back(jax.numpy.ones_like(got))["bias"], want, atol=1e-11)


def test_derivatives_of_derivatives(wide: None, cut: Any) -> None:
    cut(True, 8, 8)
    rng = np.random.default_rng(2)
    x = [jax.numpy.asarray(rng.standard_normal((1, 2, 20, 3))) for _ in range(3)]
    t = [jax.numpy.asarray(rng.standard_normal((1, 2, 20, 3))) for _ in range(3)]
    layer = pdcore.bind("causal")

    def slope(s: Any) -> Any:
        moved = [a + s * b for a, b in zip(x, t, strict=True)]
        return jax.grad(lambda *a: (layer(*a) ** 2).sum(), argnums=(0, 1, 2))(*moved)

    step = 1e-5
    _, got = jax.jvp(slope, (0.0,), (1.0,))
    for g, high, low in zip(got, slope(step), slope(-step), strict=True):
        np.testing.assert_allclose(g, (high - low) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spec", ["softmax", "causal", "causal+sparse(64,0)"])
def test_gradients_keep_no_scores(spec: str) -> None:
    x = [jax.ShapeDtypeStruct((1, 4, 4096, 16), np.float32)] * 3
    grad = jax.grad(lambda *a: pdcore.attention(*a, spec).sum(), argnums=(0, 1, 2))
    needed = jax.jit(grad).lower(*x).compile().memory_analysis().temp_size_in_bytes
    assert needed < 4 * 4096 * 4096 * 4 / 2  # half of what all scores take


@pytest.mark.parametrize("given", [*GIVEN[:2], "offset", "end"])
@pytest.mark.parametrize(
    "spec", ["causal+linear", "causal+random_features(8,0)", "causal+linear+h(count)+sh(1,3)"]
)
def test_causal_features_over_several_chunks(wide: None, spec: str, given: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, h, n, 4)) for h, n in ((4, 150), (2, 201), (2, 201)))
    real = np.arange(201) < np.array([[201], [90]])
    more: dict[str, Any] = {
        "nothing": {}, "key_mask": {"key_mask": rng.random((2, 201)) > 0.3},
        "offset": {"offset": np.array([3, -70])}, "end": {"offset": "end", "key_mask": real},
    }[given]  # fmt: skip
    out, lse, pull = pdcore.attention_vjp(q, k, v, spec, **more)
    d_out = rng.standard_normal(out.shape)
    d_lse = np.where(np.isinf(lse), 0.0, rng.standard_normal(lse.shape))
    there = {n: x if isinstance(x, str) else jax.numpy.asarray(x) for n, x in more.items()}
    got, level, back = pdcore.attention_vjp(*map(jax.numpy.asarray, (q, k, v)), spec, **there)
    np.testing.assert_allclose(got, out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(level, lse, rtol=1e-12, atol=1e-12)
    found = back(jax.numpy.asarray(d_out), jax.numpy.asarray(d_lse))
    for name, d in pull(d_out, d_lse).items():
        np.testing.assert_allclose(found[name], d, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("length", [9, 12, 13])
def test_a_pooled_key_is_rounded_once(wide: None, length: int) -> None:
    # Less itself it is 0, where a variance of 0 would make any rest of it 1e5 times as large.
    rng = np.random.default_rng(4)
    x = [rng.standard_normal((2, 2, length, 8)) for _ in range(3)]
    spec = "causal+bn(statistics=prefix)+sh(1,3)"
    _, want = pdcore.attention(*x, spec, return_lse=True)
    _, got = pdcore.attention(*map(jax.numpy.asarray, x), spec, return_lse=True)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=5e-13)


@pytest.mark.parametrize("spec", [
    "causal", "sparse(inf,8)", "causal+bn(statistics=prefix)", "causal+random_features(16,0)",
])  # fmt: skip
def test_a_program_does_not_grow_with_the_keys(spec: str) -> None:
    layer = jax.grad(lambda *a: pdcore.attention(*a, spec).sum(), argnums=(0, 1, 2))

    def lines(length: int) -> int:
        x = [jax.ShapeDtypeStruct((1, 4, length, 16), np.float32)] * 3
        return int(jax.jit(layer).lower(*x).as_text().count("\n"))

    assert lines(16384) == lines(8192) < 1.2 * lines(4096)


def test_prefix_statistics_of_no_sequences() -> None:
    x = jax.numpy.zeros((0, 2, 5, 4))
    assert pdcore.attention(x, x, x, "causal+bn(statistics=prefix)").shape == x.shape


@pytest.mark.parametrize("length", [0, 1, 16, 37])
def test_prefix_moments_of_chunks(wide: None, length: int) -> None:
    from pdcore import statistics
    from pdcore_backends.jax.prefix import prefix_states

    rng = np.random.default_rng(length)
    keys = jax.numpy.asarray(rng.standard_normal((2, 3, length, 5)))
    for mask in (None, jax.numpy.asarray(rng.random((2, 1, length, 1)) > 0.3)):
        want = statistics.prefix_states(statistics.Moments(), keys, mask, xp=jax.numpy)
        got = prefix_states(statistics.Moments(), keys, mask)
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
    """What was asked of cuDNN, and why it was not."""

    def __init__(self) -> None:
        self.causal: list[bool] = []
        self.reasons: list[str] = []


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cudnn]:
    """Choose as on a GPU, and let XLA compute what cuDNN would get."""
    from pdcore_backends.jax import cudnn, impl

    asked = Cudnn()

    def attend(*arrays: Any, **options: Any) -> Any:
        asked.causal.append(options["is_causal"])
        return jax.nn.dot_product_attention(*arrays, implementation="xla", **options)

    def unfit(*arguments: Any) -> str:
        asked.reasons.append(cudnn.unfit(*arguments))
        return asked.reasons[-1]

    jax.clear_caches()
    monkeypatch.setattr(cudnn, "_missing", lambda device: "")
    monkeypatch.setattr(cudnn, "_attend", attend)
    monkeypatch.setattr(impl, "unfit", unfit)
    yield asked
    jax.clear_caches()


def halves() -> tuple[Any, ...]:
    rng = np.random.default_rng(3)
    shapes = (2, 4, 24, 8), (2, 2, 24, 8), (2, 2, 24, 8)
    return tuple(jax.numpy.asarray(rng.standard_normal(s), jax.numpy.bfloat16) for s in shapes)


@pytest.mark.parametrize("spec", ["softmax", "bn", "causal", "sh(1,2)", "cosine(2.0)"])
def test_what_cudnn_computes(cudnn: Cudnn, spec: str) -> None:
    from pdcore_conformance.budget import expect, judge

    x = halves()
    out = pdcore.bind(spec)(*x)
    assert set(cudnn.causal) == {spec == "causal"}
    wanted = expect(*map(np.asarray, x), spec)
    assert judge({"out": np.asarray(out)}, wanted)["out"].ok
    grads = jax.grad(lambda *a: pdcore.bind(spec)(*a).sum(), argnums=(0, 1, 2))(*x)
    assert all(jax.numpy.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(
    ("spec", "more", "why"),
    [
        ("softmax", {"key_mask": np.ones((2, 24), bool)}, "key_mask may leave a row"),
        ("softmax", {"return_lse": True}, "the log-sum-exp is needed"),
        ("sparse(3,3)", {}, "a window"), ("gaussian(0.3)", {}, "no exp of an inner product"),
        ("bn(statistics=prefix)+causal", {}, "16 bit may not hold"),
        ("softmax+h(count)", {}, "the log-sum-exp is needed"),
        ("causal+sh(1,2)", {}, "pooled keys under causal"), ("causal", {"offset": 3}, None),
    ],
)  # fmt: skip
def test_what_cudnn_does_not_get(cudnn: Cudnn, spec: str, more: Any, why: str | None) -> None:
    given = {n: jax.numpy.asarray(x) if n == "key_mask" else x for n, x in more.items()}
    found = pdcore.bind(spec)(*halves(), **given)
    assert cudnn.causal == []
    assert (why or "") in cudnn.reasons[-1]
    assert bool(cudnn.reasons[-1]) == (why is not None)
    assert all(not jax.numpy.isnan(x).any() for x in jax.tree.leaves(found))


def test_explain_names_the_kernel() -> None:
    x = jax.numpy.ones((1, 2, 4, 3))
    assert "blocks of rows and keys" in str(pdcore.explain(x, x, x, "softmax"))
