"""Attention-BN on NumPy: moments of prefixes by cumulative sums, and transforms by heads."""

from __future__ import annotations

import array_api_compat.numpy as xp
import numpy as np
import pytest

import pdcore
from pdcore.extend import Mean, Moments, Summary, prefix_states
from pdcore_backends.numpy import by_heads, prefix
from pdcore_backends.numpy.impl import NumpyBackend


@pytest.mark.parametrize("stats", [Mean(), Moments()], ids=["mean", "moments"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_moments_of_prefixes_are_those_of_a_scan(
    stats: Mean, masked: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "_ELEMENTS", 4 * length)
    rng = np.random.default_rng(length)
    keys = 100 + rng.standard_normal((2, 3, length, 4))
    mask = rng.random((2, 1, length, 1)) < 0.7 if masked else None
    got = NumpyBackend().statistics(Summary(stats, "prefix"), keys, mask)
    expected = stats.finalize(prefix_states(stats, keys, mask, xp=xp), xp=xp)
    assert got.keys() == expected.keys()
    counted = expected["n"] > 0
    for name, x in expected.items():
        np.testing.assert_allclose(got[name] * counted, x, rtol=1e-10, atol=1e-10)


def test_keys_do_not_change_the_moments_of_earlier_prefixes() -> None:
    backend, rng = NumpyBackend(), np.random.default_rng(0)
    keys = rng.standard_normal((2, 50, 3)).astype("float32")
    spoilt = keys.copy()
    spoilt[:, 40:] = np.inf
    with np.errstate(all="ignore"):
        got, changed = (
            backend.statistics(Summary(Moments(), "prefix"), x, None) for x in (keys, spoilt)
        )
    for name in ("mean", "var"):
        np.testing.assert_array_equal(got[name][:, :41], changed[name][:, :41])
        assert not np.isfinite(changed[name][:, 41:]).any()


@pytest.mark.parametrize(
    "spec",
    [
        "bn",
        "bn(beta=param)",
        "bn(statistics=batch)",
        "bn(with_std=false)",
        "causal+bn(statistics=prefix)",
    ],
)
def test_heads_in_parts_have_the_results_of_all_heads(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    q, k, v, d_out = rng.standard_normal((4, 2, 5, 20, 4))
    params = {"beta": rng.random((5, 4))} if "param" in spec else None
    results = []
    for elements in (1, 2**17):
        monkeypatch.setattr(by_heads, "_ELEMENTS", elements)
        out, lse, pull = pdcore.attention_vjp(q, k, v, spec, params=params, backend="numpy")
        results.append({"out": out, "lse": lse, **pull(d_out, np.cos(lse))})
    for name, x in results[1].items():
        got = results[0][name]
        for a, b in [(got, x)] if name != "params" else [(got[n], x[n]) for n in x]:
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
