"""The laws of Attention-BN without division, on the backend of a module's fixture ``name``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore.plugins import registry as plugins
from pdcore_conformance.frameworks import framework

Array = np.ndarray[Any, Any]
STATISTICS = ("sequence", "batch", "running", "prefix")
BETA = 0.7


def draw(seed: int = 0, rows: int = 7, keys: int = 7) -> tuple[Array, Array, Array]:
    """Draw q, k and v of 2 sequences, 4 query heads, 2 key heads, with means other than 0."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, 4, rows, 5)) + rng.standard_normal(5)
    k, v = rng.standard_normal((2, 2, 2, keys, 5))
    return q, k + rng.standard_normal((2, 1, 5)), v


def values(name: str, q: Array, k: Array, v: Array, spec: str, **params: Any) -> dict[str, Array]:
    """Compute out and lse of a backend, without and with lse, in float64."""
    library = framework(plugins.registered()[name].library)
    with library.precision("float64"):
        arrays = [library.asarray(x) for x in (q, k, v)]
        given = {n: library.asarray(x) for n, x in params.items()}
        out = pdcore.attention(*arrays, spec, params=given, backend=name)
        with_lse, lse = pdcore.attention(*arrays, spec, params=given, return_lse=True, backend=name)
        results = {"out": out, "with_lse": with_lse, "lse": lse}
        return {n: library.asnumpy(x) for n, x in results.items()}


def gradients(
    name: str, q: Array, k: Array, v: Array, spec: str, **params: Any
) -> list[dict[str, Array]]:
    """Compute the gradients by `attention_vjp`, and by the framework's own rules, if any."""
    library = framework(plugins.registered()[name].library)
    rng = np.random.default_rng(5)
    with library.precision("float64"):
        x = {n: library.asarray(a) for n, a in {"q": q, "k": k, "v": v, **params}.items()}
        d = tuple(library.asarray(rng.standard_normal(s)) for s in (q.shape, q.shape[:-1]))
        qkv, given = [x[n] for n in "qkv"], {n: x[n] for n in params}
        ways = [pdcore.attention_vjp(*qkv, spec, params=given, backend=name)[2](*d)]
        if library.has_autodiff:

            def function(x: Mapping[str, Any]) -> Any:
                given = {n: x[n] for n in params}
                return pdcore.attention(
                    x["q"], x["k"], x["v"], spec, params=given, return_lse=True, backend=name
                )

            ways.append(library.vjp(function, x, d)[1])
        return [{n: library.asnumpy(g) for n, g in way.items()} for way in ways]


def close(got: Array, want: Array, relative: float = 1e-12) -> None:
    scale = float(np.max(np.abs(want), initial=0.0, where=np.isfinite(want)))
    np.testing.assert_allclose(got, want, rtol=0, atol=relative * max(scale, 1.0))


def means(k: Array, statistics: str) -> Array:
    """Compute mu of the keys: (*, Hkv, 1, D), or (B, Hkv, M, D) of prefixes."""
    if statistics == "prefix":
        return np.cumsum(k, axis=-2) / np.arange(1, k.shape[-2] + 1)[:, None]
    return k.mean((0, 2) if statistics == "batch" else -2, keepdims=True)


def per_query_head(x: Array) -> Array:
    return np.repeat(x, 2, axis=-3)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_it_is_plain_attention_of_other_queries(name: str, statistics: str) -> None:
    q, k, v = draw()
    mean = means(k, statistics)
    params: dict[str, Array] = {}
    if statistics == "running":
        params["mean"] = np.random.default_rng(1).standard_normal((2, 5))
        mean = params["mean"][:, None]
    centre = BETA * per_query_head(mean)
    causal = "+causal" if statistics == "prefix" else ""
    plain = values(name, q - centre, k, v, f"softmax{causal}")
    spec = f"bn(beta={BETA},statistics={statistics},with_std=false){causal}"
    got = values(name, q, k, v, spec, **params)
    close(got["out"], plain["out"])
    close(got["with_lse"], plain["out"])
    close(got["lse"], plain["lse"] - ((q - centre) * centre).sum(-1) / math.sqrt(5))


@pytest.mark.parametrize("statistics", ["sequence", "batch", "running"])
def test_it_is_the_division_by_one(name: str, statistics: str) -> None:
    q, k, v = draw()
    eps = pdcore.Batch().eps
    mean = means(k, statistics)
    var = ((k - mean) ** 2).mean((0, 2) if statistics == "batch" else -2, keepdims=True)
    params: dict[str, Array] = {}
    if statistics == "running":
        params["mean"] = np.random.default_rng(1).standard_normal((2, 5))
    else:
        k = mean + (k - mean) * np.sqrt((1 - eps) / var)
    more = {"var": np.full((2, 5), 1 - eps)} if params else {}
    options = f"beta={BETA},statistics={statistics}"
    divided = values(name, q, k, v, f"bn({options})", **params, **more)
    recentred = values(name, q, k, v, f"bn({options},with_std=false)", **params)
    for n, x in divided.items():
        close(recentred[n], x)
    ways = zip(
        gradients(name, q, k, v, f"bn({options})", **params, **more),
        gradients(name, q, k, v, f"bn({options},with_std=false)", **params),
        strict=True,
    )
    for with_std, without in ways:
        for n in "qv":
            close(without[n], with_std[n], 1e-11)
        if statistics != "running":  # the variance of the keys is held by the division alone
            assert np.abs(without["k"] - with_std["k"]).max() > 1e-3


@pytest.mark.parametrize("statistics", ["sequence", "batch", "running"])
def test_the_gaussian_kernel_does_not_see_it(name: str, statistics: str) -> None:
    q, k, v = draw()
    # A mean that no result depends on may be NaN, and so may a weight of it.
    params = {"beta": np.full((2, 5), math.nan)}
    if statistics == "running":
        params["mean"] = np.full((2, 5), math.nan)
    spec = f"gaussian(gamma=0.3)+bn(beta=param,statistics={statistics},with_std=false)"
    plain = values(name, q, k, v, "gaussian(gamma=0.3)")
    for n, x in values(name, q, k, v, spec, **params).items():
        close(x, plain[n])
    want = gradients(name, q, k, v, "gaussian(gamma=0.3)")
    for way, expected in zip(gradients(name, q, k, v, spec, **params), want, strict=True):
        for n in "qkv":
            close(way[n], expected[n])
        np.testing.assert_array_equal(way["beta"], 0.0)


def test_a_nan_of_one_sequence_stays_there_under_the_gaussian_kernel(name: str) -> None:
    q, k, v = draw()
    k[0] = math.nan
    spec = "gaussian(gamma=0.3)+bn(statistics=batch,with_std=false)"
    plain = values(name, q[1:], k[1:], v[1:], "gaussian(gamma=0.3)")
    for n, x in values(name, q, k, v, spec).items():
        assert np.isnan(x[0]).all()
        close(x[1:], plain[n])


@pytest.mark.parametrize("beta", ["0.7", "param"])
def test_it_grows_with_prefix_statistics(name: str, beta: str) -> None:
    q, k, v = draw(rows=40, keys=40)
    params = {"beta": np.random.default_rng(2).standard_normal((2, 5))} if beta == "param" else {}
    spec = f"causal+bn(beta={beta},statistics=prefix,with_std=false)"
    whole = values(name, q, k, v, spec, **params)
    for m in (1, 17):
        short = values(name, *(x[..., :m, :] for x in (q, k, v)), spec, **params)
        for n, x in short.items():
            close(x, whole[n][:, :, :m])


def test_a_variance_that_overflows_is_not_computed(name: str) -> None:
    q, k, v = draw(keys=8)
    whole = np.rint(4 * k[..., :4, :])
    k = 2.0**532 * np.concatenate([whole, -whole], axis=-2)  # sums are exact, and the mean is 0
    q = 2.0**-532 * q / 4
    plain = values(name, q, k, v, "softmax")
    for n, x in values(name, q, k, v, "bn(with_std=false)").items():
        close(x, plain[n])
    assert np.isnan(values(name, q, k, v, "bn")["out"]).all()
