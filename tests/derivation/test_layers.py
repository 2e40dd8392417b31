"""Attention derived from a layer: the layer of the dual's solution is the attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore.derivation import LAYERS, derive
from pdcore.dispatch import parameter_shape
from pdcore.errors import SpecError
from pdcore.spec import Normalization

M, N, D, DV = 14, 5, 3, 2
RNG = np.random.default_rng(0)
KEYS, QUERIES = RNG.standard_normal((M, D)) + 0.5, RNG.standard_normal((N, D))
#: Layers whose arguments have no default, with arguments that fit.
WRITTEN = {"conv2d": "conv2d(2,7)"}
# Multipliers as a solver returns them: their differences sum to 0 for each output feature.
GAP = RNG.standard_normal((M, DV))
GAP -= GAP.mean(axis=0)


def parameters(found: pdcore.Derivation) -> dict[str, Any]:
    """Draw the params of a derived attention."""
    rng = np.random.default_rng(3)
    return {
        p.name: rng.standard_normal(parameter_shape(p.shapes[0], 1, D))
        for p in found.spec.parameters()
    }


def convolved(weight: Any) -> Any:
    """Convolve the keys, on a grid of 2 by 7 where the weight is (3, 3, D)."""
    if weight.ndim == 2:
        padded = np.pad(KEYS, ((1, 1), (0, 0)))
        return np.stack([np.sum(weight * padded[j : j + 3], axis=0) for j in range(M)])
    padded = np.pad(KEYS.reshape(2, 7, D), ((1, 1), (1, 1), (0, 0)))
    return np.stack(
        [
            np.sum(weight * padded[r : r + 3, c : c + 3], axis=(0, 1))
            for r in range(2)
            for c in range(7)
        ]
    )


def transform(
    layer: str, normalization: Normalization, params: dict[str, Any]
) -> Callable[[Any], Any]:
    """Write T out."""
    if layer.startswith("conv"):
        return lambda x: convolved(params["weight"][0]) if x is KEYS else x
    mean, var = KEYS.mean(axis=0), KEYS.var(axis=0)
    if layer == "linear":
        return lambda x: x
    if layer == "batch_norm":
        return lambda x: (x - mean) / np.sqrt(var + 1e-5)
    if layer == "instance_enhanced_batch_norm":
        gate = 1.0 / (1.0 + np.exp(-(params["slope"][0] * mean + params["shift"][0])))
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
    found = derive(WRITTEN.get(layer, layer), kernel, dim=D, dtype="float64")
    params = parameters(found)
    t, kappa = transform(layer, found.spec.normalization, params), KERNELS[kernel]
    x, y = t(QUERIES), t(KEYS)
    h_q, h_k = kappa(x, y).sum(axis=1), kappa(y, y).sum(axis=1)
    want = kappa(x, y) @ (GAP / h_k[:, None]) / h_q[:, None]
    if kernel in FEATURES:  # the layer f(x) = W Phi(T(x)) / h(x) of the dual's solution
        phi = FEATURES[kernel]
        w = (GAP / h_k[:, None]).T @ phi(y)
        np.testing.assert_allclose((phi(x) @ w.T) / h_q[:, None], want, rtol=1e-9, atol=1e-12)
    got = pdcore.attention(
        QUERIES[None], KEYS[None], (GAP / h_k[:, None])[None], found.spec, params=params
    )[0]
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11 * np.abs(want).max())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_derivation_is_data(layer: str) -> None:
    found = derive(WRITTEN.get(layer, layer), "gaussian(0.3)", dim=D, dtype="float64")
    assert found.layer == layer
    q, k, v = (x[None] for x in (QUERIES, KEYS, GAP))
    params = parameters(found)
    assert found.plan == pdcore.explain(q, k, v, found.spec, params=params).plan
    assert [step.title for step in found.steps] == [
        "The layer",
        "The regression",
        "Its dual",
        "The attention",
        "The plan",
    ]
    where = f"For D = {D}, 1 key head and float64:"
    assert found.steps[-1].text == "\n".join((where, *found.plan.steps))
    assert str(found.spec) in str(found)
    latex = found.latex()
    assert latex.count(r"\begin{align*}") == latex.count(r"\end{align*}") == 4
    # The steps have the same lines as the derivation of the spec.
    lines = [line.removesuffix(r" \\") for line in latex.splitlines() if line.startswith("&")]
    whole = [line.removesuffix(r" \\") for line in found.spec.latex().splitlines()[1:-1]]
    assert lines == whole
    assert json.loads(json.dumps(found.to_dict()))["spec"] == str(found.spec)


def test_the_text_says_what_tau_is_and_what_is_fitted_by_row() -> None:
    assert "tau = 1 / sqrt(D)." in str(derive("linear"))
    assert "tau = 0.5." in str(derive("linear", "softmax(0.5)"))
    assert "tau" not in str(derive("linear", "relu"))
    assert "for every query anew" in str(derive("batch_norm(statistics=prefix)"))
    assert "for every query anew" not in str(derive("batch_norm"))


@pytest.mark.parametrize("layer", ["", "conv1d(", "conv1d+bn"])
def test_unknown_layers_are_refused(layer: str) -> None:
    with pytest.raises(SpecError, match=r"^layer.* expected one layer, such as 'batch_norm' or"):
        derive(layer)


def test_arguments_are_those_of_the_normalization() -> None:
    found = derive("mixture_norm", pdcore.Gaussian(0.5), components=3, steps=1)
    assert found.spec == pdcore.parse("gaussian(0.5)+mixture(3,steps=1)")
    assert derive("mixture_norm(3, steps=1)", pdcore.Gaussian(0.5)).spec == found.spec
    assert derive("batch_norm()", eps=0.5).spec == pdcore.parse("bn(eps=0.5)")


def test_the_text_says_that_a_convolution_leaves_queries() -> None:
    text = str(derive("conv1d"))
    assert "a query is one point, without neighbours, and T leaves it" in text
    assert "a query" not in str(derive("batch_norm")).partition("2. The regression")[0]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"layer": "batchnorm"}, SpecError, "got 'batchnorm'; did you mean 'batch_norm'?"),
        ({"kernel": "softmax+bn"}, SpecError, "got 'softmax+bn', expected the word of a kernel"),
        ({"kernel": 3}, TypeError, "kernel: got int, expected a pdcore.Kernel or its word"),
        ({"layer": "bn"}, SpecError, "got 'bn'; did you mean 'batch_norm'?"),
        ({"layer": "conv"}, SpecError, "got 'conv'; did you mean 'conv"),
        ({"layer": "linear+conv1d"}, SpecError, "got 'linear+conv1d', expected one layer"),
        ({"layer": "conv1d(3"}, SpecError, "cannot read it at column 7"),
        ({"layer": "conv1d(sise=3)"}, SpecError, "unknown argument 'sise'; did you mean 'size'?"),
        ({"layer": "conv1d(3)", "size": 5}, SpecError, "got 'conv1d(3)' and size beside it"),
        ({"layer": "conv2d"}, SpecError, "height and width must be given"),
        ({"layer": 3}, TypeError, "layer: got int, expected a name of LAYERS"),
        ({"layer": "linear", "eps": 1.0}, SpecError, "linear: unknown argument 'eps'"),
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
