"""Test the oracle against plain Python loops over rows, keys and features."""

from __future__ import annotations

import decimal
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from pdcore.errors import UnsupportedError
from pdcore.reference import reference_attention, reference_weights
from pdcore.spec import (
    AttentionSpec,
    FeatureMap,
    Moments,
    Normalization,
    Parameter,
    PointwiseKernel,
    Statistics,
    as_spec,
    expression,
)

# --- the second oracle: scalars only --------------------------------------------------------------

Vector = list[float]


def dot(x: Vector, y: Vector) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def exponential(x: Vector, y: Vector) -> float:
    return math.exp(dot(x, y) / math.sqrt(len(x)))


def capped(x: Vector, y: Vector) -> float:
    return math.exp(1.5 * math.tanh(0.7 * dot(x, y) / 1.5))


def gaussian(x: Vector, y: Vector) -> float:
    return math.exp(-0.3 * math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)))


def cosine(x: Vector, y: Vector) -> float:
    lengths = math.hypot(*x) * math.hypot(*y)
    return math.exp(2.0 * dot(x, y) / lengths) if lengths else 1.0


def polynomial(x: Vector, y: Vector) -> float:
    return (0.5 * dot(x, y) + 0.25) ** 4


def elu(x: Vector, y: Vector) -> float:
    phi = [[t + 1 if t > 0 else math.exp(t) for t in z] for z in (x, y)]
    return dot(*phi)


def relu(x: Vector, y: Vector) -> float:
    return dot([max(t, 0.0) for t in x], [max(t, 0.0) for t in y])


def random_features(x: Vector, y: Vector) -> float:
    dim, tau = len(x), 0.8
    omega = np.random.RandomState(3).standard_normal((5, dim)).tolist()
    phi = [
        [math.exp(math.sqrt(tau) * dot(o, z) - tau * dot(z, z) / 2) / math.sqrt(5) for o in omega]
        for z in (x, y)
    ]
    return dot(*phi)


KERNELS: dict[str, Callable[[Vector, Vector], float]] = {
    "softmax": exponential,
    "softmax(scale=0.7,softcap=1.5)": capped,
    "gaussian(gamma=0.3)": gaussian,
    "cosine(scale=2)": cosine,
    "polynomial(degree=4,coef0=0.25,scale=0.5)": polynomial,
    "linear": elu,
    "relu": relu,
    "random_features(count=5,seed=3,scale=0.8)": random_features,
}
WITH_LOG = ("softmax", "gaussian", "cosine", "polynomial")


def moments(rows: list[Vector]) -> tuple[Vector, Vector]:
    n = len(rows)
    mean = [math.fsum(column) / n for column in zip(*rows, strict=True)]
    var = [
        math.fsum((t - m) ** 2 for t in column) / n
        for column, m in zip(zip(*rows, strict=True), mean, strict=True)
    ]
    return mean, var


def loops(
    q: Any,
    k: Any,
    v: Any,
    text: str,
    *,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    params: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Compute out, lse and the weights over the original keys, for q of shape (B, Hq, N, D)."""
    spec = as_spec(text)
    kappa = KERNELS[text.split("+")[0]]
    batches, query_heads, rows, dim = q.shape
    key_heads, length = k.shape[1:3]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    lse = np.full(q.shape[:3], -math.inf)
    weights = np.zeros((*q.shape[:3], length))
    for i in range(query_heads):
        g = i // (query_heads // key_heads)
        scale = spec.heads.scales[g] if spec.heads.scales else 1
        pooled = []  # per sequence: (first position, real members, chosen members, key, value)
        for b in range(batches):
            pooled.append([])
            for a in range(0, length, scale):
                members = [
                    j
                    for j in range(a, min(a + scale, length))
                    if key_mask is None or key_mask[b, j]
                ]
                if not members:
                    continue
                chosen = members[:1] if spec.heads.pool == "first" else members
                key, value = (
                    [math.fsum(x[b, g, j, d] for j in chosen) / len(chosen) for d in range(size)]
                    for x, size in ((k, dim), (v, v.shape[-1]))
                )
                pooled[b].append((a, members, chosen, key, value))
        for b in range(batches):
            if isinstance(offset, str):
                real = [j for j in range(length) if key_mask is None or key_mask[b, j]]
                shift = (real[-1] if real else -1) - (rows - 1)
            else:
                shift = int(np.broadcast_to(offset, (batches,))[b])
            for n in range(rows):
                position = n + shift
                transformed = _transforms(spec, pooled, b, g, scale, position, params or {}, dim)
                if transformed is None:
                    continue
                terms = []
                for a, members, chosen, key, value in pooled[b]:
                    last = a + scale - 1
                    if spec.support.causal and last > position:
                        continue
                    if a < position - spec.support.left or last > position + spec.support.right:
                        continue
                    if mask is not None and not all(mask[b, i, n, j] for j in members):
                        continue
                    factor = 1.0
                    if bias is not None:
                        if bias[b, i, n, a] == -math.inf:
                            continue
                        factor = math.exp(bias[b, i, n, a])
                    x, y = transformed(q[b, i, n].tolist()), transformed(key)
                    terms.append((factor * kappa(x, y), chosen, value))
                if not terms:
                    continue
                total = math.fsum(t[0] for t in terms)
                h = {"sum": total, "count": float(len(terms)), "one": 1.0}[spec.normaliser]
                if h == 0:
                    continue
                lse[b, i, n] = math.log(h)
                for d in range(v.shape[-1]):
                    out[b, i, n, d] = math.fsum(t * value[d] for t, _, value in terms) / h
                for t, chosen, _ in terms:
                    for j in chosen:
                        weights[b, i, n, j] = t / h / len(chosen)
    return out, lse, weights


def _transforms(
    spec: AttentionSpec,
    pooled: list[Any],
    b: int,
    g: int,
    scale: int,
    position: int,
    params: Mapping[str, Any],
    dim: int,
) -> Callable[[Vector], Vector] | None:
    """Return T for one row, or None where prefix statistics have no key."""
    bn: Any = spec.normalization
    if bn.word == "identity":
        return lambda x: x
    if bn.statistics == "running":
        mean, var = params["mean"][g].tolist(), params["var"][g].tolist()
    else:
        seen = list(itertools.chain(*pooled)) if bn.statistics == "batch" else pooled[b]
        if bn.statistics == "prefix":
            seen = [entry for entry in seen if entry[0] + scale - 1 <= position]
        if not seen:
            return None
        mean, var = moments([entry[3] for entry in seen])
    beta = bn.beta
    if beta == "param":
        beta = params["beta"][g]
    beta = np.broadcast_to(beta, (dim,)).tolist()
    return lambda x: [
        (t - w * m) / math.sqrt(s + bn.eps) for t, w, m, s in zip(x, beta, mean, var, strict=True)
    ]


# --- all axes -------------------------------------------------------------------------------------

B, HQ, HKV, N, M, D, DV = 2, 4, 2, 4, 7, 3, 2


def operands(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    shapes = ((B, HQ, N, D), (B, HKV, M, D), (B, HKV, M, DV))
    q, k, v = (rng.normal(size=shape) for shape in shapes)
    return q, k + 0.5, v


def matched(text: str, rng: np.random.Generator) -> dict[str, Any]:
    """Draw the params that a spec needs."""
    params = {}
    if "beta=param" in text:
        params["beta"] = rng.normal(size=(HKV,) if rng.random() < 0.5 else (HKV, D))
    if "running" in text:
        params["mean"] = rng.normal(size=(HKV, D))
        params["var"] = rng.uniform(0.5, 2.0, size=(HKV, D))
    return params


def restrictions(text: str, rng: np.random.Generator) -> dict[str, Any]:
    """Draw masks, a bias and an offset."""
    drawn: dict[str, Any] = {}
    if rng.random() < 0.5:
        drawn["mask"] = rng.random((B, HQ, N, M)) < 0.7
    if rng.random() < 0.5:
        drawn["key_mask"] = rng.random((B, M)) < 0.7
    if rng.random() < 0.5 and text.startswith(WITH_LOG) and "sh(" not in text:
        bias = rng.normal(size=(B, HQ, N, M))
        drawn["bias"] = np.where(rng.random(bias.shape) < 0.2, -math.inf, bias)
    choices = [0, 2, -1, np.asarray(1), rng.integers(-3, 6, size=(B,)), "end"]
    drawn["offset"] = choices[rng.integers(len(choices))]
    return drawn


def agree(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Check that results agree; entries exactly 0 or infinite must be so on both sides."""
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    finite = np.isfinite(expected)
    scale = max(np.max(np.abs(expected), where=finite, initial=0.0), 1e-300)
    np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=tolerance * scale)
    np.testing.assert_array_equal(got[~finite], expected[~finite])


def check(text: str, rng: np.random.Generator) -> None:
    q, k, v = operands(rng)
    options = {**restrictions(text, rng), "params": matched(text, rng)}
    out, lse = reference_attention(q, k, v, text, return_lse=True, **options)
    expected = loops(q, k, v, text, **options)
    for got, want in zip(
        (out, lse, reference_weights(q, k, v, text, **options)), expected, strict=True
    ):
        agree(got, want)


# eps is large because a single key has variance 0: T would be large, and exp overflow in the loops
NORMALIZATIONS = (
    "",
    "bn(beta=0.5,eps=0.1)",
    "bn(beta=param,eps=0.1)",
    "bn(statistics=batch,eps=0.1)",
    "bn(beta=param,statistics=running)",
)
HEADS = ("", "sh(1,3)", "sh(2,4)", "sh(2,3,pool=first)")
SUPPORTS = ("", "causal", "sparse(2,1)", "sparse(3,inf)", "sparse(inf,3)", "causal+sparse(5,5)")


def joined(*words: str) -> str:
    return "+".join(word for word in words if word)


@pytest.mark.parametrize("normaliser", ["h(sum)", "h(count)", "h(one)"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.sampled(3)
def test_kernels_with_every_normalization_and_head_scaling(kernel: str, normaliser: str) -> None:
    rng = np.random.default_rng(0)
    for normalization, heads, _ in itertools.product(NORMALIZATIONS, HEADS, range(2)):
        check(joined(kernel, normalization, heads, normaliser), rng)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.sampled(2)
def test_support(support: str, heads: str) -> None:
    rng = np.random.default_rng(1)
    if support.startswith("sparse(2,1)") and "4" in heads:
        heads = heads.replace("4", "3")  # a scale of 4 is wider than the window: refused
    normalizations = [
        "",
        "bn(allow_leak=true,eps=0.1)",
        "bn(statistics=prefix,beta=0.7,eps=0.1)",
        "bn(statistics=prefix,beta=param,eps=0.1)",
    ]
    for normalization, normaliser in itertools.product(
        normalizations, ("h(sum)", "h(count)", "h(one)")
    ):
        for _ in range(3):
            check(joined("softmax", normalization, heads, support, normaliser), rng)
    for kernel in ("gaussian(gamma=0.3)", "linear"):
        check(joined(kernel, "bn(allow_leak=true,eps=0.1)", heads, support), rng)


# --- by hand --------------------------------------------------------------------------------------


def test_softmax_of_two_keys_by_hand() -> None:
    q, k = np.ones((1, 1, 1)), np.asarray([[[0.0], [math.log(3.0)]]])
    v = np.asarray([[[1.0, 0.0], [0.0, 1.0]]])
    out, lse = reference_attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, [[[0.25, 0.75]]], rtol=1e-15)  # kappa = 1 and 3
    np.testing.assert_allclose(lse, [[math.log(4.0)]], rtol=1e-15)
    for h, n in (("count", 2), ("one", 1)):
        out, lse = reference_attention(q, k, v, f"softmax+h({h})", return_lse=True)
        np.testing.assert_allclose(out, [[[1 / n, 3 / n]]], rtol=1e-15)
        np.testing.assert_allclose(lse, [[math.log(n)]], atol=1e-16)


def test_batch_normalization_by_hand() -> None:
    # mean 2, biased var 1, so T(k) = -1, 1 and T(4) = 2 (eps is negligible)
    q, k, v = np.asarray([[[4.0]]]), np.asarray([[[1.0], [3.0]]]), np.asarray([[[0.0], [1.0]]])
    out = reference_attention(q, k, v, "bn(eps=1e-300)")
    np.testing.assert_allclose(out, [[[1 / (1 + math.exp(-4.0))]]], rtol=1e-15)


def test_head_scaling_by_hand() -> None:
    # windows {0, 1}, {2, 3}, {4}: key 1 is padding and the last window is short
    k = np.zeros((1, 1, 5, 1))
    v = np.asarray([[[[1.0], [100.0], [2.0], [4.0], [8.0]]]])
    real = np.asarray([[True, False, True, True, True]])
    q = np.zeros((1, 1, 6, 1))
    out = reference_attention(q, k, v, "sh(2)", key_mask=real)
    np.testing.assert_allclose(out[0, 0, :, 0], [(1 + 3 + 8) / 3] * 6)
    out = reference_attention(q, k, v, "sh(2,pool=first)", key_mask=real)
    np.testing.assert_allclose(out[0, 0, :, 0], [(1 + 2 + 8) / 3] * 6)
    # causal: a window is seen from its nominal end on, 5 for the short one
    out = reference_attention(q, k, v, "sh(2)+causal", key_mask=real)
    np.testing.assert_allclose(out[0, 0, :, 0], [0, 1, 1, 2, 2, 4])
    weights = reference_weights(q, k, v, "sh(2)+causal", key_mask=real)
    np.testing.assert_allclose(weights[0, 0, 4], [0.5, 0, 0.25, 0.25, 0])
    # a mask must allow all of the real keys
    mask = np.asarray([True, False, True, False, True])
    out = reference_attention(q, k, v, "sh(2)", key_mask=real, mask=mask)
    np.testing.assert_allclose(out[0, 0, :, 0], [(1 + 8) / 2] * 6)


def test_prefix_statistics_by_hand() -> None:
    # row 0: var 0, so T(x) = (x - 5) / sqrt(eps); row 1: mean 6, var 1
    k, v = np.asarray([[[5.0], [7.0]]]), np.asarray([[[1.0], [2.0]]])
    q = np.asarray([[[5.0], [6.5]]])
    out = reference_attention(q, k, v, "causal+bn(statistics=prefix,eps=3)")
    e = math.exp(1 / 8)  # T(6.5) = 1/4, T(k) = -1/2, 1/2
    weight = e / (e + 1 / e)
    np.testing.assert_allclose(out[0, :, 0], [1.0, 2 * weight + (1 - weight)], rtol=1e-14)
    # without causal the first row sees key 1 too, with the statistics of key 0
    out = reference_attention(q, k, v, "bn(statistics=prefix,eps=3)")
    np.testing.assert_allclose(out[0, 0], [1.5])  # T(5) = 0
    # before every key: no statistics, zeros
    out, lse = reference_attention(
        q, k, v, "bn(statistics=prefix)+h(count)", offset=-2, return_lse=True
    )
    assert not out.any()
    assert (lse == -math.inf).all()


def test_end_puts_the_last_query_on_the_last_real_key() -> None:
    q, k = np.zeros((3, 1, 2, 1)), np.zeros((3, 1, 4, 1))
    v = k + np.asarray([1.0, 2.0, 4.0, 8.0])[:, None]
    real = np.asarray([[True, True, False, False], [False, True, True, True], [False] * 4])
    out = reference_attention(q, k, v, "causal", offset="end", key_mask=real)
    np.testing.assert_allclose(out[..., 0], [[[1, 1.5]], [[3, 14 / 3]], [[0, 0]]])
    out = reference_attention(q, k, v, "causal", offset="end")
    np.testing.assert_allclose(out[0, 0, :, 0], [7 / 3, 15 / 4])


def test_lse_where_kernel_values_vanish() -> None:
    q, k, v = np.ones((1, 2, 1)), -np.ones((1, 3, 1)), np.ones((1, 3, 1))
    for kernel in ("relu", "polynomial(coef0=1,scale=1)"):
        for h, expected in (("sum", -math.inf), ("count", math.log(3)), ("one", 0.0)):
            out, lse = reference_attention(q, k, v, f"{kernel}+h({h})", return_lse=True)
            np.testing.assert_array_equal(out, 0.0)
            np.testing.assert_allclose(lse, expected)
            nothing = np.zeros(3, dtype=bool)
            out, lse = reference_attention(
                q, k, v, f"{kernel}+h({h})", mask=nothing, return_lse=True
            )
            np.testing.assert_array_equal(out, 0.0)
            np.testing.assert_array_equal(lse, -math.inf)


def test_a_bias_of_minus_infinity_removes_the_key_from_the_count() -> None:
    rng = np.random.default_rng(2)
    q, k, v = operands(rng)
    mask = rng.random((B, HQ, N, M)) < 0.6
    bias = np.where(mask, 0.0, -math.inf)
    for h in ("sum", "count", "one"):
        with_bias = reference_attention(q, k, v, f"softmax+h({h})", bias=bias, return_lse=True)
        with_mask = reference_attention(q, k, v, f"softmax+h({h})", mask=mask, return_lse=True)
        for x, y in zip(with_bias, with_mask, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_zero_vector_has_cosine_zero_with_everything() -> None:
    q, k = np.zeros((1, 1, 2)), np.asarray([[[3.0, 4.0], [0.0, 0.0]]])
    np.testing.assert_allclose(reference_weights(q, k, k, "cosine"), [[[0.5, 0.5]]])
    _, lse = reference_attention(k, k, k, "cosine", return_lse=True)
    np.testing.assert_allclose(np.exp(lse), [[math.e + 1, 2.0]])


# --- invariances ----------------------------------------------------------------------------------

CAUSAL = (
    "causal",
    "causal+sh(2,3)",
    "causal+bn(statistics=prefix)",
    "causal+bn(statistics=prefix,beta=0.5)+sh(2,3,pool=first)",
    "gaussian(gamma=0.3)+causal+sh(1,2)",
    "linear+causal+sparse(3,0)+h(count)",
    "random_features(count=5,seed=3)+causal+sh(2,2)",
)


@pytest.mark.parametrize("spec", CAUSAL)
def test_growth(spec: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(B, HQ, M, D)), *operands(rng)[1:]
    whole = reference_attention(q, k, v, spec, return_lse=True)
    for m in range(M + 1):
        part = reference_attention(
            q[..., :m, :], k[..., :m, :], v[..., :m, :], spec, return_lse=True
        )
        agree(part[0], whole[0][..., :m, :], 1e-14)
        agree(part[1], whole[1][..., :m], 1e-14)
        if m:  # and one step of decoding
            step = reference_attention(
                q[..., m - 1 : m, :], k[..., :m, :], v[..., :m, :], spec, offset=m - 1
            )
            agree(step, whole[0][..., m - 1 : m, :], 1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_disjoint_key_blocks_merge(kernel: str) -> None:
    rng = np.random.default_rng(4)
    q, k, v = operands(rng)
    mask = rng.random((B, HQ, N, M)) < 0.5
    for h in ("sum", "count", "one"):
        spec = f"{kernel}+h({h})"
        out, lse = reference_attention(q, k, v, spec, mask=mask, return_lse=True)
        blocks = [
            reference_attention(
                q, k[..., at, :], v[..., at, :], spec, mask=mask[..., at], return_lse=True
            )
            for at in (slice(0, 3), slice(3, M))
        ]
        if h == "one":
            agree(blocks[0][0] + blocks[1][0], out)
            np.testing.assert_array_equal(np.maximum(blocks[0][1], blocks[1][1]), lse)
            continue
        with np.errstate(invalid="ignore"):
            merged = np.logaddexp(blocks[0][1], blocks[1][1])
            parts = [np.exp(block[1] - merged)[..., None] * block[0] for block in blocks]
        agree(merged, lse)
        agree(np.where(np.isfinite(lse)[..., None], parts[0] + parts[1], 0.0), out)


def test_scales_of_one_and_unit_statistics_change_nothing() -> None:
    rng = np.random.default_rng(5)
    q, k, v = operands(rng)
    plain = reference_attention(q, k, v)
    np.testing.assert_array_equal(reference_attention(q, k, v, "sh(1,1)"), plain)
    unit = {"mean": np.zeros((HKV, D)), "var": np.full((HKV, D), 0.75)}
    spec = "bn(statistics=running,eps=0.25)"
    np.testing.assert_array_equal(reference_attention(q, k, v, spec, params=unit), plain)
    order = rng.permutation(M)
    for kernel in KERNELS:
        agree(
            reference_attention(q, k[..., order, :], v[..., order, :], kernel + "+bn"),
            reference_attention(q, k, v, kernel + "+bn"),
        )
    agree(reference_attention(q, k + rng.normal(size=D), v), plain, 1e-13)


def test_leading_axes() -> None:
    rng = np.random.default_rng(6)
    q, k, v = (np.stack([x, y]) for x, y in zip(operands(rng), operands(rng), strict=True))
    key_mask = rng.random((2, B, M)) < 0.7
    offset = rng.integers(0, 4, size=(2, B))
    spec = "bn(allow_leak=true)+sh(1,2)+causal"
    options = {"key_mask": key_mask, "offset": offset}
    five = reference_attention(q, k, v, spec, **options)
    for a, b in itertools.product(range(2), range(B)):
        single = reference_attention(
            q[a, b], k[a, b], v[a, b], spec, key_mask=key_mask[a, b], offset=offset[a, b]
        )
        np.testing.assert_array_equal(five[a, b], single)
    # batch statistics are over every leading axis
    flat = [x.reshape((2 * B, *x.shape[2:])) for x in (q, k, v)]
    spec = "bn(statistics=batch)"
    agree(reference_attention(*flat, spec).reshape(five.shape), reference_attention(q, k, v, spec))


def test_masks_and_bias_broadcast() -> None:
    rng = np.random.default_rng(7)
    q, k, v = operands(rng)
    mask, bias = rng.random((N, M)) < 0.6, rng.normal(size=(HQ, 1, M))
    got = reference_attention(q, k, v, mask=mask, bias=bias)
    full = (B, HQ, N, M)
    expected = reference_attention(
        q, k, v, mask=np.broadcast_to(mask, full), bias=np.broadcast_to(bias, full)
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "spec",
    [
        "softmax",
        "bn",
        "linear",
        "bn(statistics=prefix)+sh(1,2)",
        "random_features",
        "cosine+h(count)",
        "polynomial+h(one)",
        "gaussian(gamma=1)+causal+sparse(2,2)",
    ],
)
@pytest.mark.parametrize(("n", "m", "b"), [(0, 3, 2), (3, 0, 2), (0, 0, 2), (3, 3, 0)])
def test_empty(spec: str, n: int, m: int, b: int) -> None:
    q, k, v = np.ones((b, 2, n, D)), np.ones((b, 2, m, D)), np.ones((b, 2, m, DV))
    for offset in (0, "end"):
        for key_mask in (None, np.ones((b, m), dtype=bool)):
            options = {"offset": offset, "key_mask": key_mask}
            out, lse = reference_attention(q, k, v, spec, return_lse=True, **options)
            assert out.shape == (b, 2, n, DV)
            assert reference_weights(q, k, v, spec, **options).shape == (b, 2, n, m)
            if m == 0:
                assert not out.any()
                assert (lse == -math.inf).all()


# --- NaN and infinity -----------------------------------------------------------------------------

EVERY_KIND = (
    *KERNELS,
    *(f"{kernel}+bn+h(count)" for kernel in KERNELS),
    "bn(statistics=batch)+sh(1,2)",
    "bn(statistics=prefix)+sh(2,3)",
    "causal+bn(statistics=prefix)",
    "linear+sh(2,3,pool=first)+sparse(3,2)+h(one)",
)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("spec", EVERY_KIND)
def test_padding_may_hold_anything(spec: str, poison: float) -> None:
    rng = np.random.default_rng(8)
    q, k, v = operands(rng)
    real = rng.random((B, M)) < 0.6
    padding = ~real[:, None, :, None]
    clean = reference_attention(q, k, v, spec, key_mask=real, return_lse=True)
    dirty = reference_attention(
        q,
        np.where(padding, poison, k),
        np.where(padding, poison, v),
        spec,
        key_mask=real,
        return_lse=True,
    )
    for x, y in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(x, y)
    if spec.startswith(WITH_LOG) and "sh(" not in spec:
        bias = np.where(real[:, None, None, :], 0.0, poison)
        got = reference_attention(q, k, v, spec, key_mask=real, bias=bias)
        np.testing.assert_array_equal(got, clean[0])


NAN_KINDS = (
    *KERNELS,
    "relu+h(one)",
    "linear+h(count)",
    "softmax+h(one)",
    "bn(statistics=prefix)",
    "sh(2,3)",
    "sh(2,1,pool=first)",
    "linear+sh(1,2)",
)


@pytest.mark.parametrize(
    ("spec", "which"),
    [
        (spec, which)
        for spec in NAN_KINDS
        for which in ("q", "k", "v", "bias")
        if which != "bias" or (spec.startswith(WITH_LOG) and "sh(" not in spec)
    ],
)
def test_a_nan_reaches_exactly_the_rows_that_see_it(spec: str, which: str) -> None:
    rng = np.random.default_rng(9)
    q, k, v = operands(rng)
    spec = joined(spec, "causal")
    scale = dict(enumerate(as_spec(spec).heads.scales or (1, 1)))
    options = {"offset": 2, "bias": np.zeros((B, HQ, N, M)) if which == "bias" else None}
    clean, clean_lse = reference_attention(q, k, v, spec, return_lse=True, **options)
    b, head, at = 1, 1, 3
    expected = np.zeros((B, HQ, N), dtype=bool)
    if which == "q":
        q[b, head, at, 0] = math.nan
        expected[b, head, at] = True
    elif which == "bias":
        options["bias"][b, head, 2, at] = math.nan
        expected[b, head, 2] = True
    else:
        at = 4  # head 1 has scale 1 or 3, or 2, whose window starts there
        (k if which == "k" else v)[b, head, at, 0] = math.nan
        last = at // scale[head] * scale[head] + scale[head] - 1
        for i in (2 * head, 2 * head + 1):
            expected[b, i] = np.arange(N) + 2 >= last
    out, lse = reference_attention(q, k, v, spec, return_lse=True, **options)
    columns = slice(0, 1) if which == "v" else slice(None)
    np.testing.assert_array_equal(np.isnan(out[..., columns]).any(-1), expected)
    np.testing.assert_array_equal(out[~expected], clean[~expected])
    np.testing.assert_array_equal(out[..., 1][expected] == clean[..., 1][expected], which == "v")
    if which == "v":
        np.testing.assert_array_equal(lse, clean_lse)
    elif "h(" not in spec:
        np.testing.assert_array_equal(np.isnan(lse), expected)


def test_infinite_values_give_what_the_sum_gives() -> None:
    q, k = np.zeros((1, 5, 1)), np.zeros((1, 3, 1))
    v = np.asarray([[[math.inf], [1.0], [-math.inf]]])
    mask = np.asarray([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]], dtype=bool)
    out = reference_attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(out[0, :, 0], [math.inf, -math.inf, math.nan, 1.0, 0.0])
    out = reference_attention(q, k, v, "relu+h(one)", mask=mask)  # 0 * inf would be NaN
    np.testing.assert_array_equal(out[0, :, 0], [math.nan, math.nan, math.nan, 0.0, 0.0])


# --- dtypes and libraries -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*EVERY_KIND, "causal+sh(2,3)+h(count)", "sparse(2,1)"])
def test_array_api_strict_gives_the_same_numbers(spec: str) -> None:
    rng = np.random.default_rng(10)
    q, k, v = operands(rng)
    options = {"mask": rng.random((N, M)) < 0.7, "key_mask": rng.random((B, M)) < 0.7}
    options["offset"] = rng.integers(0, 4, size=(B,))
    if spec.startswith(WITH_LOG) and "sh(" not in spec:
        options["bias"] = rng.normal(size=(HQ, N, M))
    expected = reference_attention(q, k, v, spec, return_lse=True, **options)
    strict = {name: array_api_strict.asarray(x) for name, x in options.items()}
    arrays = [array_api_strict.asarray(x) for x in (q, k, v)]
    for got, want in zip(
        reference_attention(*arrays, spec, return_lse=True, **strict), expected, strict=True
    ):
        assert type(got) is type(arrays[0])
        agree(np.asarray(got), want, 1e-13)
    weights = reference_weights(*arrays, spec, **strict)
    agree(np.asarray(weights), reference_weights(q, k, v, spec, **options), 1e-13)
    end = reference_attention(*arrays, spec, **{**strict, "offset": "end"})
    agree(
        np.asarray(end), reference_attention(q, k, v, spec, **{**options, "offset": "end"}), 1e-13
    )


@pytest.mark.parametrize("spec", [*KERNELS, "bn(beta=param)", "bn(statistics=prefix)+sh(1,2)"])
def test_longdouble_stays_longdouble(spec: str) -> None:
    rng = np.random.default_rng(11)
    q, k, v = operands(rng)
    options = {"params": {"beta": np.full((HKV,), 0.9)}} if "param" in spec else {}
    exact = reference_attention(
        *(x.astype(np.longdouble) for x in (q, k, v)), spec, return_lse=True, **options
    )
    low = reference_attention(q, k, v, spec, return_lse=True, **options)
    for x, y in zip(exact, low, strict=True):
        assert x.dtype == np.longdouble
        assert y.dtype == np.float64
        agree(x.astype(np.float64), y, 2e-14)
    if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps:
        assert (exact[0] != low[0]).any()


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="longdouble is float64 here")
@pytest.mark.parametrize("normaliser", ["sum", "count"])
def test_longdouble_against_decimal(normaliser: str) -> None:
    rng = np.random.default_rng(12)
    q, k, v = (rng.normal(size=(1, n, 4)) for n in (2, 5, 5))
    out, lse = reference_attention(
        *(x.astype(np.longdouble) for x in (q, k, v)), f"softmax+h({normaliser})", return_lse=True
    )
    with decimal.localcontext(prec=40):
        number = decimal.Decimal
        for n in range(2):
            kappa = [
                (sum(number(x) * number(y) for x, y in zip(q[0, n], key, strict=True)) / 2).exp()
                for key in k[0]
            ]
            h = sum(kappa) if normaliser == "sum" else number(5)
            expected = sum(w * number(x) for w, x in zip(kappa, v[0, :, 0], strict=True)) / h
            assert abs(number(str(out[0, n, 0])) / expected - 1) < number("3e-18")
            assert abs(number(str(lse[0, n])) / h.ln() - 1) < number("3e-18")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "spec",
    [
        "softmax",
        "bn+sh(1,2)",
        "linear",
        "bn(statistics=prefix)",
        "random_features",
        "polynomial+h(count)",
        "sh(2,3,pool=first)",
    ],
)
def test_16_bit_is_float32_rounded_once(spec: str, dtype: Any) -> None:
    q, k, v = (x.astype(dtype) for x in operands(np.random.default_rng(13)))
    out, lse = reference_attention(q, k, v, spec, return_lse=True)
    wide = [x.astype(np.float32) for x in (q, k, v)]
    expected, expected_lse = reference_attention(*wide, spec, return_lse=True)
    assert expected.dtype == lse.dtype == np.float32
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, expected.astype(dtype))
    np.testing.assert_array_equal(lse, expected_lse)
    weights = reference_weights(q, k, v, spec)
    np.testing.assert_array_equal(weights, reference_weights(*wide, spec).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_rounded_intermediates(dtype: Any) -> None:
    q, k, v = (x.astype(dtype) for x in operands(np.random.default_rng(14)))
    got = reference_attention(q, k, v, "bn(beta=0.5)", round_intermediates=dtype)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    mean, var = k.mean(axis=2, keepdims=True), k.var(axis=2, keepdims=True)
    x, y = (
        ((z - np.float32(0.5) * mean) / np.sqrt(var + np.float32(1e-5))).astype(dtype)
        for z in (q, k)
    )
    x, y = x.astype(np.float32), y.astype(np.float32)
    kappa = np.exp(np.float32(D**-0.5) * (x @ np.swapaxes(y, -1, -2)))
    weights = (kappa / kappa.sum(axis=-1, keepdims=True)).astype(dtype).astype(np.float32)
    expected = (weights @ v).astype(dtype)
    assert got.dtype == dtype
    same = (got == expected).mean()
    assert same > 0.9  # a sum in another order may tip a rounding
    assert np.abs(got.astype(np.float64) - expected.astype(np.float64)).max() < (
        4 * float(ml_dtypes.finfo(dtype).eps) * np.abs(expected.astype(np.float64)).max()
    )
    once = reference_attention(*(z.astype(dtype) for z in (q, k, v)), "bn(beta=0.5)")
    assert (got != once).any()
    # With every key in the past, prefix statistics are those of the sequence; T(q), T(k) show in
    # lse, which is not rounded itself.
    lses = [
        reference_attention(q, k, v, spec, offset=M, return_lse=True, round_intermediates=rounding)[
            1
        ]
        for spec, rounding in (
            ("bn", dtype),
            ("bn(statistics=prefix)", dtype),
            ("bn(statistics=prefix)", None),
        )
    ]
    # An ulp of the statistics may tip a rounding here and there.
    assert np.median(np.abs(lses[1] - lses[0])) < 2e-6
    assert np.median(np.abs(lses[1] - lses[2])) > 2e-5


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (1e3 * x for x in operands(np.random.default_rng(15)))
    for kernel in KERNELS:
        out, lse = reference_attention(q, k, v, kernel, return_lse=True)
        assert np.isfinite(out).all(), kernel
        if kernel != "relu":
            assert np.isfinite(lse).all(), kernel


# --- what users add -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Square(PointwiseKernel):
    """(s + shift)^2 with a shift for each head."""

    word = "square"

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("shift", (("H",),), default=0.25),)

    def log_kappa(
        self, s: expression.Expression, dim: int, **params: expression.Expression
    ) -> expression.Expression:
        return 2.0 * expression.log(abs(s + params["shift"]))

    def latex(self) -> str:
        return "(s + c)^2"


@dataclass(frozen=True)
class Bilinear(FeatureMap):
    """x.(a y) with positive a; kappa may be negative."""

    signed = True
    word = "bilinear"

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("metric", (("H",), ("H", "D"))),)

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        assert x.ndim == 4
        return x * xp.sqrt(params["metric"])

    def latex(self) -> str:
        return "x A y"


@dataclass(frozen=True)
class LogRelu(FeatureMap):
    """phi = relu(x), computed as log phi."""

    log_domain = True
    word = "log_relu"

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return xp.log(xp.where(x > 0, x, xp.zeros_like(x)))

    def latex(self) -> str:
        return "relu"


@dataclass(frozen=True)
class PositiveExp(FeatureMap):
    """phi = exp(x), computed as log phi."""

    log_domain = True
    word = "positive_exp"

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x

    def latex(self) -> str:
        return "e^x e^y"


class CentredTwice(Statistics):
    """Two rounds: the mean, then the mean of the keys minus it."""

    rounds = 2

    def zero(self, like: Any, *, xp: Any) -> Any:
        raise AssertionError("the reference has the whole key set")

    merge = zero

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: Any = None) -> Any:
        if previous is not None:
            keys = keys - previous["mean"]
        state = Moments().of(keys, mask, xp=xp)
        return {**state, "first": state["mean"] if previous is None else previous["mean"]}

    def finalize(self, state: Any, *, xp: Any) -> Any:
        return {**Moments().finalize(state, xp=xp), "first": state["first"]}


@dataclass(frozen=True)
class Standardise(Normalization):
    """The normalization of bn, written by the public hooks."""

    statistics: str = "moments"
    word = "standardise"

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("weight", (("H", "D"),), default=1.0),)

    def statistics_state(self) -> Statistics:
        return Moments() if self.statistics == "moments" else CentredTwice()

    def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        mean = state["mean"] if self.statistics == "moments" else state["mean"] + state["first"]
        return (x - params["weight"] * mean) / xp.sqrt(state["var"] + 1e-5)

    def latex(self) -> str:
        return "T"


def test_user_pointwise_kernel() -> None:
    rng = np.random.default_rng(16)
    q, k, v = operands(rng)
    bias = rng.normal(size=(M,))
    for h in ("sum", "count", "one"):
        got = reference_attention(q, k, v, AttentionSpec(Square(), h), bias=bias, return_lse=True)
        expected = reference_attention(
            q, k, v, f"polynomial(degree=2,coef0=0.25,scale=1)+h({h})", bias=bias, return_lse=True
        )
        for x, y in zip(got, expected, strict=True):
            agree(x, y)
    shift = np.asarray([0.25, 1.0])
    got = reference_attention(q, k, v, AttentionSpec(Square()), params={"shift": shift})
    expected = reference_attention(q, k, v, "polynomial(degree=2,coef0=1,scale=1)")
    agree(got[:, 2:], expected[:, 2:])
    q[0, 0, 1] = 0.0  # all kernel values of one row vanish
    out = reference_attention(q, k, v, AttentionSpec(Square()), params={"shift": 0 * shift})
    assert not out[0, 0, 1].any()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("shape", [(HKV,), (HKV, D)])
def test_user_feature_map(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(17)
    q, k, v = operands(rng)
    metric = rng.uniform(0.5, 2.0, size=shape)
    got = reference_attention(
        q, k, v, AttentionSpec(Bilinear(), "count"), params={"metric": metric}
    )
    full = np.broadcast_to(metric.reshape(HKV, 1, -1), (HKV, 1, D))
    scores = q.reshape(B, HKV, 2, N, D) @ np.swapaxes(k * full, -1, -2)[:, :, None]
    agree(got, (scores @ v[:, :, None] / M).reshape(got.shape))
    with pytest.raises(UnsupportedError, match="negative"):
        AttentionSpec(Bilinear())
    got = reference_attention(q, k, v, AttentionSpec(PositiveExp()))
    kappa = np.exp(q.reshape(B, HKV, 2, N, D)) @ np.swapaxes(np.exp(k), -1, -2)[:, :, None]
    agree(got, (kappa @ v[:, :, None] / kappa.sum(-1, keepdims=True)).reshape(got.shape))
    q[0, 0, 1] = -1.0  # kappa = 0 for every key
    for h in ("sum", "count"):
        got, lse = reference_attention(q, k, v, AttentionSpec(LogRelu(), h), return_lse=True)
        expected = reference_attention(q, k, v, f"relu+h({h})", return_lse=True)
        agree(got, expected[0])
        agree(lse, expected[1])


@pytest.mark.parametrize("statistics", ["moments", "rounds"])
def test_user_normalization(statistics: str) -> None:
    rng = np.random.default_rng(18)
    q, k, v = operands(rng)
    real = rng.random((B, M)) < 0.7
    spec = AttentionSpec(normalization=Standardise(statistics))
    agree(
        reference_attention(q, k, v, spec, key_mask=real),
        reference_attention(q, k, v, "bn", key_mask=real),
    )
    weight = rng.normal(size=(HKV, D))
    got = reference_attention(q, k, v, spec, params={"weight": weight})
    agree(got, reference_attention(q, k, v, "bn(beta=param)", params={"beta": weight}))


# --- refusals -------------------------------------------------------------------------------------

F = np.ones((2, 4, 3))
REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "bias without log": (UnsupportedError, "bias.*linear", {"spec": "linear", "bias": F[0, 0, 0]}),
    "bias of random features": (
        UnsupportedError,
        "bias",
        {"spec": "random_features", "bias": F[0, 0]},
    ),
    "bias of pooled keys": (UnsupportedError, "pooled", {"spec": "sh(1,2)", "bias": F[0, 0]}),
    "bias dtype": (TypeError, "bias", {"bias": np.ones((4, 4), dtype=np.float16)}),
    "scales": (ValueError, "3 scales.*2 heads", {"spec": "sh(1,2,3)"}),
    "mask dtype": (TypeError, "mask.*bool", {"mask": np.ones((4, 4))}),
    "key_mask dtype": (ValueError, "key_mask", {"key_mask": np.ones(4)}),
    "key_mask shape": (ValueError, "key_mask", {"key_mask": np.ones((1, 4), dtype=bool)}),
    "mask list": (TypeError, "mask", {"mask": [True] * 4}),
    "offset word": (ValueError, "offset", {"offset": "start"}),
    "offset float": (ValueError, "offset", {"offset": 1.5}),
    "offset bool": (ValueError, "offset", {"offset": True}),
    "offset shape": (ValueError, "offset", {"offset": np.zeros((2,), dtype=np.int64)}),
    "unknown param": (
        ValueError,
        "'gamma'.*beta",
        {"spec": "bn(beta=param)", "params": {"beta": np.ones(2), "gamma": np.ones(2)}},
    ),
    "missing param": (
        ValueError,
        "'var' is missing",
        {"spec": "bn(statistics=running)", "params": {"mean": np.ones((2, 3))}},
    ),
    "param shape": (
        ValueError,
        "'beta' has shape",
        {"spec": "bn(beta=param)", "params": {"beta": np.ones(3)}},
    ),
    "heads": (ValueError, "heads", {"q": np.ones((3, 4, 3))}),
    "features": (ValueError, "shapes", {"q": np.ones((2, 4, 2))}),
    "leading axes": (ValueError, "shapes", {"q": np.ones((1, 2, 4, 3))}),
    "values": (ValueError, "v: got shape", {"v": np.ones((2, 5, 3))}),
    "rank": (ValueError, "q: got shape", {"q": np.ones((4, 3))}),
    "dtypes": (TypeError, "float32", {"v": F.astype(np.float32)}),
    "integers": (TypeError, "int64", {name: F.astype(np.int64) for name in "qkv"}),
    "spec": (TypeError, "spec", {"spec": 3}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    error, message, changed = REFUSED[case]
    options = {"q": F, "k": F, "v": F, **changed}
    with pytest.raises(error, match=message):
        reference_attention(**options)


def test_mixed_libraries_are_refused() -> None:
    with pytest.raises(TypeError):
        reference_attention(F, F, array_api_strict.asarray(F))
