"""Attention derived from a layer: the layer of the dual's solution is the attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore.errors import SpecError
from pdcore.layers import LAYERS, derive
from pdcore.normalization import Normalization

M, N, D, DV = 14, 5, 3, 2
RNG = np.random.default_rng(0)
KEYS, QUERIES = RNG.standard_normal((M, D)) + 0.5, RNG.standard_normal((N, D))
PARAMS = {name: RNG.standard_normal((1, D)) for name in ("slope", "shift")}
# Multipliers as a solver would leave them: their differences sum to 0 for each output feature.
GAP = RNG.standard_normal((M, DV))
GAP -= GAP.mean(axis=0)


def transform(layer: str, normalization: Normalization) -> Callable[[Any], Any]:
    """Write T out for the keys."""
    mean, var = KEYS.mean(axis=0), KEYS.var(axis=0)
    if layer == "linear":
        return lambda x: x
    if layer == "batch_norm":
        return lambda x: (x - mean) / np.sqrt(var + 1e-5)
    if layer == "instance_enhanced_batch_norm":
        gate = 1.0 / (1.0 + np.exp(-(PARAMS["slope"][0] * mean + PARAMS["shift"][0])))
        return lambda x: gate * (x - mean) / np.sqrt(var + 1e-5)
    stats = normalization.statistics_state()
    assert stats is not None
    state: Any = None
    for _ in range(stats.rounds):
        state = stats.finalize(stats.of(KEYS[None], None, xp=np, previous=state), xp=np)
    pi, mu, spread = state["weight"][0, :, 0] / M, state["mean"][0], state["var"][0] + 1e-5

    def mixed(x: Any) -> Any:
        z = (x[:, None] - mu) / np.sqrt(spread)
        density = pi * np.exp(-0.5 * np.sum(z * z, axis=-1)) / np.sqrt(np.prod(spread, axis=-1))
        r = density / density.sum(axis=-1, keepdims=True)
        return np.sum(r[..., None] * z, axis=1)

    return mixed


def elu(x: Any) -> Any:
    return np.where(x > 0, x + 1.0, np.exp(np.minimum(x, 0.0)))


def squares(x: Any) -> Any:
    """Phi of (x.y / sqrt(D) + 1)^2: the products of all pairs of (x / D^(1/4), 1)."""
    extended = np.concatenate([x / D**0.25, np.ones((len(x), 1))], axis=1)
    return (extended[:, :, None] * extended[:, None, :]).reshape(len(x), -1)


#: Kernels whose Phi can be written down, so that the layer itself can be.
FEATURES: dict[str, Callable[[Any], Any]] = {
    "linear": elu,
    "polynomial(degree=2,coef0=1)": squares,
}
KERNELS: dict[str, Callable[[Any, Any], Any]] = {
    "exponential": lambda x, y: np.exp(x @ y.T / np.sqrt(D)),
    "gaussian(gamma=0.3)": lambda x, y: np.exp(-0.3 * np.sum((x[:, None] - y) ** 2, axis=-1)),
    **{name: lambda x, y, phi=phi: phi(x) @ phi(y).T for name, phi in FEATURES.items()},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_derived_attention_is_the_expansion(layer: str, kernel: str) -> None:
    found = derive(layer, kernel, dim=D, dtype="float64")
    t, kappa = transform(layer, found.spec.normalization), KERNELS[kernel]
    x, y = t(QUERIES), t(KEYS)
    h_q, h_k = kappa(x, y).sum(axis=1), kappa(y, y).sum(axis=1)
    want = kappa(x, y) @ (GAP / h_k[:, None]) / h_q[:, None]
    if kernel in FEATURES:  # the layer f(x) = W Phi(T(x)) / h(x) of the dual's solution
        phi = FEATURES[kernel]
        w = (GAP / h_k[:, None]).T @ phi(y)
        np.testing.assert_allclose((phi(x) @ w.T) / h_q[:, None], want, rtol=1e-9, atol=1e-12)
    params = PARAMS if found.spec.parameters() else None
    got = pdcore.attention(
        QUERIES[None], KEYS[None], (GAP / h_k[:, None])[None], found.spec, params=params
    )[0]
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11 * np.abs(want).max())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_derivation_is_data(layer: str) -> None:
    found = derive(layer, "gaussian(0.3)", dim=D, dtype="float64")
    q, k, v = (x[None] for x in (QUERIES, KEYS, GAP))
    params = PARAMS if found.spec.parameters() else None
    assert found.plan == pdcore.explain(q, k, v, found.spec, params=params).plan
    assert [step.title for step in found.steps] == [
        "The layer", "The regression", "Its dual", "The attention", "The plan",
    ]  # fmt: skip
    assert found.steps[-1].text == "\n".join(found.plan.steps)
    assert str(found.spec) in str(found)
    latex = found.latex()
    assert latex.count(r"\begin{align*}") == latex.count(r"\end{align*}") == 4
    # Step by step it says what the spec says at once.
    lines = [line.removesuffix(r" \\") for line in latex.splitlines() if line.startswith("&")]
    whole = [line.removesuffix(r" \\") for line in found.spec.latex().splitlines()[1:-1]]
    assert lines == whole
    assert json.loads(json.dumps(found.to_dict()))["spec"] == str(found.spec)


def test_arguments_are_those_of_the_normalization() -> None:
    found = derive("mixture_norm", pdcore.Gaussian(0.5), components=3, steps=1)
    assert found.spec == pdcore.parse("gaussian(0.5)+mixture(3,steps=1)")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"layer": "batchnorm"}, SpecError, "got 'batchnorm'; did you mean 'batch_norm'?"),
        ({"kernel": "softmax+bn"}, SpecError, "got 'softmax+bn', expected the word of a kernel"),
        ({"kernel": 3}, TypeError, "kernel: got int, expected a pdcore.Kernel or its word"),
        ({"layer": "linear", "eps": 1.0}, SpecError, "unexpected keyword argument 'eps'"),
        ({"layer": "batch_norm", "eps": -1.0}, SpecError, "bn: eps is -1.0"),
        ({"heads": 0}, SpecError, "heads: got 0, expected a whole number >= 1"),
        ({"dim": -3}, SpecError, "dim: got -3, expected a whole number >= 1"),
        ({"dtype": "int8"}, SpecError, "dtype: got 'int8', expected one of float16"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        derive(**arguments)
    assert says in str(caught.value)
