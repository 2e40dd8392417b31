"""The blocks of the JAX backend: results, and derivatives, do not depend on the block sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import pdcore

SPECS = [
    "softmax",
    "causal",
    "sparse(5,3)",
    "causal+sparse(20,0)",
    "bn",
    "gaussian(0.3)",
    "polynomial(2,1.0)+h(count)",
    "exponential(softcap=5.0)",
    "sh(1,2)",
    "causal+sh(1,2)",
    "random_features(32,0)+sparse(9,9)",
    "linear+sparse(4,4)",
]
OPTIONS = ["nothing", "key_mask", "mask", "offset", "bias"]
CUTS = [(True, 16, 32), (False, 16, 32), (True, 32, 1000)]


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled() -> Iterator[None]:
    """Switch XLA's optimizations off: they take most of the time, for programs that run once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that forces a block size on programs compiled from then on."""
    from pdcore_backends.jax import blocks, scores

    def force(mapped: bool, rows: int, keys: int) -> None:
        jax.clear_caches()
        sizes = blocks.BlockSizes(mapped, rows, keys)
        monkeypatch.setattr(scores, "sizes", lambda *a, **k: sizes)

    yield force
    jax.clear_caches()


def arrays(option: str, group: int = 2) -> tuple[list[Any], dict[str, Any]]:
    """Draw arrays with two key heads, and with lengths that no block size divides."""
    rng = np.random.default_rng(0)
    shapes = (2, 2 * group, 77, 8), (2, 2, 93, 8), (2, 2, 93, 5)
    q, k, v = (rng.standard_normal(s) for s in shapes)
    if option == "key_mask":
        return [q, k, v], {"key_mask": rng.random((2, 93)) > 0.3}
    if option == "mask":
        return [q, k, v], {"mask": rng.random((2, 1, 77, 93)) > 0.3}
    if option == "offset":
        return [q, k, v], {"offset": np.array([3, -2])}
    if option == "bias":
        return [q, k, v], {"bias": rng.standard_normal((2 * group, 1, 93))}
    return [q, k, v], {}


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.sampled(3)
def test_every_cut_gives_the_same(wide: None, cut: Any, spec: str, sizes: Any) -> None:
    cut(*sizes)
    rng = np.random.default_rng(1)
    option = OPTIONS[(SPECS.index(spec) + CUTS.index(sizes)) % 4]
    # Key heads with a single query head take a different code path.
    x, more = arrays(option, group=2 if sizes == CUTS[0] else 1)
    out, lse, pull = pdcore.attention_vjp(*x, spec, **more)
    d_out = rng.standard_normal(out.shape)
    d_lse = np.where(np.isinf(lse), 0.0, rng.standard_normal(lse.shape))
    want = pull(d_out, d_lse)
    there = {name: jax.numpy.asarray(a) for name, a in more.items()}
    got, level, back = pdcore.attention_vjp(*map(jax.numpy.asarray, x), spec, **there)
    np.testing.assert_allclose(got, out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(level, lse, rtol=1e-12, atol=1e-12)
    grads = back(jax.numpy.asarray(d_out), jax.numpy.asarray(d_lse))
    for name, d in want.items():
        np.testing.assert_allclose(grads[name], d, rtol=1e-11, atol=1e-11, err_msg=name)


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


@pytest.mark.parametrize("option", ["nothing", "key_mask", "offset", "offsets", "end"])
@pytest.mark.parametrize(
    "spec", ["causal+linear", "causal+random_features(8,0)", "causal+linear+h(count)+sh(1,3)"]
)
@pytest.mark.sampled(3)
def test_causal_features_over_several_chunks(wide: None, spec: str, option: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, h, n, 4)) for h, n in ((4, 150), (2, 201), (2, 201)))
    real = np.arange(201) < np.array([[201], [90]])
    more: dict[str, Any] = {
        "nothing": {},
        "key_mask": {"key_mask": rng.random((2, 201)) > 0.3},
        "offset": {"offset": np.array(7)},
        "offsets": {"offset": np.array([3, -70])},
        "end": {"offset": "end", "key_mask": real},
    }[option]
    out, lse, pull = pdcore.attention_vjp(q, k, v, spec, **more)
    d_out = rng.standard_normal(out.shape)
    d_lse = np.where(np.isinf(lse), 0.0, rng.standard_normal(lse.shape))
    there = {n: x if isinstance(x, str) else jax.numpy.asarray(x) for n, x in more.items()}
    got, level, back = pdcore.attention_vjp(*map(jax.numpy.asarray, (q, k, v)), spec, **there)
    np.testing.assert_allclose(got, out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(level, lse, rtol=1e-12, atol=1e-12)
    grads = back(jax.numpy.asarray(d_out), jax.numpy.asarray(d_lse))
    for name, d in pull(d_out, d_lse).items():
        np.testing.assert_allclose(grads[name], d, rtol=1e-11, atol=1e-11, err_msg=name)


def test_log_features_far_below_the_range_of_exp_under_causal(wide: None) -> None:
    rng = np.random.default_rng(4)
    q, k, v = (x + rng.standard_normal((1, 1, 70, 4)) for x in (30.0, 30.0, 0.0))
    spec = "causal+random_features(8,0)"
    out, lse = pdcore.attention(q, k, v, spec, return_lse=True)
    assert (lse < -750.0).all()
    there = map(jax.numpy.asarray, (q, k, v))
    got, level = pdcore.attention(*there, spec, return_lse=True)
    np.testing.assert_allclose(got, out, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(level, lse, rtol=1e-12)
