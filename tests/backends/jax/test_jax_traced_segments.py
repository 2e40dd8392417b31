"""Packed sequences on JAX whose ids are traced: the results are those of ids with values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from segment_laws import IDS, K, Q, V, params_of

import pdcore
from pdcore import Mean, Moments
from pdcore.errors import NoBackendError
from pdcore_backends.jax.segments import _moments

pytestmark = pytest.mark.sampled(3)  # a program is compiled for each spec


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


#: Runs of many lengths in two sequences, so that blocks of keys are skipped; -1 is padding.
LONG = np.stack(
    [
        pdcore.segments_from_lengths([300, 5, 200, 80], total=600),
        np.concatenate([[-1] * 40, [7] * 260, [2] * 299, [5]]),
    ]
)


def drawn(ids: Any, heads: int, dim: int = 8, seed: int = 0) -> Any:
    x = np.random.default_rng(seed).standard_normal((2, heads, ids.shape[1], dim))
    return np.where((ids >= 0)[:, None, :, None], x, np.nan)


def check(spec: str, ids: Any, q: Any, k: Any, v: Any, **options: Any) -> None:
    """Compare results and gradients with those of NumPy, which cuts the segments out."""
    params = params_of(spec)
    rng = np.random.default_rng(3)
    d_out, d_lse = rng.standard_normal(q.shape), rng.standard_normal(q.shape[:-1])
    d_lse *= (ids >= 0)[:, None]
    out, lse, pull = pdcore.attention_vjp(q, k, v, spec, segments=ids, params=params, **options)
    want = {"out": out, "lse": lse, **pull(d_out, d_lse)}

    @jax.jit
    def run(arrays: Any, named: Any) -> Any:
        def call(q: Any, k: Any, v: Any, params: Any) -> Any:
            return pdcore.attention(q, k, v, spec, params=params, return_lse=True, **named)

        results, pull = jax.vjp(call, *arrays)
        *d, d_params = pull((jnp.asarray(d_out), jnp.asarray(d_lse)))
        return dict(zip(("out", "lse", "q", "k", "v"), (*results, *d), strict=True)) | d_params

    arrays, named = jax.tree.map(jnp.asarray, ((q, k, v, params), {"segments": ids, **options}))
    for name, x in run(arrays, named).items():
        np.testing.assert_allclose(x, want[name], rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    "spec",
    [
        "softmax",
        "bn",
        "bn(beta=param)",
        "bn(with_std=false)+h(sum,sink=param)",
        "softmax(softcap=3)+bn",
        "causal+alibi",
        "sparse(2,1)",
        "bn(statistics=batch)",
        "bn(statistics=running)",
        "softmax+h(count)",
        "cosine",
    ],
)
def test_results_and_gradients(spec):
    check(spec, IDS, Q, K, V)


def test_tables():
    labels = np.random.default_rng(6).integers(0, 3, IDS.shape)
    check("relative(2)+labels(3)", IDS, Q, K, V, labels=labels)


@pytest.mark.parametrize("spec", ["bn", "causal+alibi", "sparse(9,4)"])
def test_several_blocks(spec):
    check(spec, LONG, drawn(LONG, 4), drawn(LONG, 2, seed=1), drawn(LONG, 2, seed=2))


def test_masks_and_bias():
    rng = np.random.default_rng(5)
    options = {
        "key_mask": rng.random(IDS.shape) < 0.7,
        "mask": rng.random((2, 1, 17, 17)) < 0.7,
        "bias": rng.standard_normal((1, 4, 17, 17)),
    }
    check("bn", IDS, Q, K, V, **options)


def test_weights_and_vmap():
    x, ids = np.nan_to_num(Q[:, :2]), jnp.asarray(IDS)
    want = pdcore.attention_weights(x, x, x, "bn", segments=IDS)
    got = jax.jit(lambda x, ids: pdcore.attention_weights(x, x, x, "bn", segments=ids))(x, ids)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    mapped = jax.vmap(lambda x, ids: pdcore.attention(x, x, x, "bn", segments=ids))
    out = pdcore.attention(x, x, x, "bn", segments=IDS)
    np.testing.assert_allclose(mapped(jnp.asarray(x), ids), out, rtol=1e-9, atol=1e-11)


def test_another_segment_changes_neither_statistics_nor_gradients():
    """NaN in a segment reaches no statistic of another, and large keys no row of another."""
    x = jnp.asarray(np.nan_to_num(Q[:, :2], nan=0.3))
    far = np.where((IDS == 9)[:, None, :, None], 1e15, x)  # in float64
    others = np.isin(IDS, (4, 3))[0]

    @jax.jit
    def run(k: Any, ids: Any) -> Any:
        def loss(q: Any, k: Any) -> Any:
            return jnp.sum(pdcore.attention(q, k, k, "bn", segments=ids)[0][:, others] ** 2)

        out = pdcore.attention(x, k, k, "bn", segments=ids)
        return out, *jax.grad(loss, (0, 1))(x, k)

    want, got = (run(jnp.asarray(k), jnp.asarray(IDS)) for k in (x, far))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b[0][:, others], a[0][:, others], rtol=1e-9, atol=1e-12)
    mean = _moments(
        Mean(),
        jnp.where(jnp.asarray(IDS == 9)[:, None, :, None], jnp.nan, x),
        jnp.ones((2, 1, 17, 1), bool),
        jnp.asarray(IDS),
    )["mean"]
    np.testing.assert_array_equal(np.isnan(mean).any((1, 3)), IDS == 9)


def test_moments_keep_their_digits_at_a_mean_of_100():
    ids = np.repeat(np.arange(8), 128)[None]
    keys = 100 + 0.1 * np.random.default_rng(0).standard_normal((1, 1, 1024, 4))
    keys[0, 0, 128] = 1e4  # the first key of a segment is an outlier
    narrow = keys.astype(np.float32)
    mask = jnp.ones((1, 1, 1024, 1), bool)
    final = _moments(Moments(), jnp.asarray(narrow), mask, jnp.asarray(ids))
    for i in range(8):
        own = narrow[0, 0, ids[0] == i].astype(float)
        mean, var = (np.asarray(final[name])[0, 0, ids[0] == i] for name in ("mean", "var"))
        np.testing.assert_allclose(mean, np.broadcast_to(own.mean(0), mean.shape), rtol=3e-7)
        np.testing.assert_allclose(var, np.broadcast_to(own.var(0), var.shape), rtol=3e-6)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("sh(2,2)", {}, "not with"),
        ("causal+bn(statistics=prefix)", {}, "not with"),
        ("iebn", {}, "not with"),
        ("conv1d", {}, "not with"),
        ("gaussian(0.3)", {}, "not with"),
        ("linear", {}, "not with"),
        ("softmax", {"offset": "end"}, "offset is 'end'"),
        ("softmax", {"pair": True}, "and a pair"),
    ],
)
def test_what_is_refused(spec, options, message):
    x, ids = jnp.ones((1, 2, 4, 3)), jnp.zeros((1, 4), int)
    params = {
        n: jnp.ones([{"H": 2, "D": 3}.get(s, s) for s in p.shapes[0]])
        for n, p in {p.name: p for p in pdcore.parse(spec).parameters()}.items()
    }
    named = {n: o for n, o in options.items() if n != "pair"}

    @jax.jit
    def packed(q, ids):
        both = (ids, ids + 0) if "pair" in options else ids
        return pdcore.attention(q, q, q, spec, segments=both, params=params, **named)

    with pytest.raises(NoBackendError, match=f"segments: the ids are traced, .*{message}"):
        packed(x, ids)
