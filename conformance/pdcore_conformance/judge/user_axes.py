"""Define kernels and a normalization as users write them, to test backends on.

`register` adds their words when the suite starts; no other code uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdcore.spec import (
    Expression,
    FeatureMap,
    Moments,
    Normalization,
    Parameter,
    PointwiseKernel,
    Statistics,
    default_scale,
    exp,
    find_kernel,
    log,
    maximum,
    register_kernel,
    register_normalization,
)

__all__ = ["Centred", "Dot", "Logistic", "Placed", "Square", "Tempered", "register"]

State = Mapping[str, Any]


@dataclass(frozen=True)
class Logistic(PointwiseKernel):
    """kappa = 1 / (1 + exp(-(tau x.y + shift))), with one shift for each head."""

    scale: float | None = None
    word = "conformance_logistic"

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declaration of ``shift``, (H,), by default 0."""
        return (Parameter("shift", (("H",),), default=0.0),)

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        """Return log kappa, without overflow for large positive or negative s."""
        z = default_scale(self.scale, dim) * s + params["shift"]
        return -(maximum(-z, 0.0) + log(1.0 + exp(-abs(z))))

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        return r"\sigma(\tau x^\top y + c)"


@dataclass(frozen=True)
class Tempered(PointwiseKernel):
    """kappa = exp(t tau x.y), with one t for each query head."""

    word = "conformance_tempered"

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declaration of ``temperature``, (Hq,), by default 1."""
        return (Parameter("temperature", (("Hq",),), default=1.0),)

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        """Return log kappa."""
        return default_scale(None, dim) * params["temperature"] * s

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        return r"\exp(t \tau x^\top y)"


@dataclass(frozen=True)
class Placed(PointwiseKernel):
    """kappa = exp(tau x.y + kinds[l_i, l_j] near[j - p] - slope |j - p|)."""

    word = "conformance_placed"
    places = ("distance", "query_label", "key_label")

    def parameters(self) -> tuple[Parameter, ...]:
        """Return a slope and two tables for each query head."""
        return (
            Parameter("slope", (("Hq",),), default=0.1),
            Parameter("near", (("Hq", 5),), default=1.0),
            Parameter("kinds", (("Hq", 3, 3),)),
        )

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        """Return log kappa."""
        distance = params["distance"]
        kinds = params["kinds"][params["query_label"], params["key_label"]]
        far = params["slope"] * abs(distance)
        return default_scale(None, dim) * s + kinds * params["near"][distance + 2] - far

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        return r"\exp(\tau x^\top y + K_{l_i l_j} n_{j - p} - m |j - p|)"


@dataclass(frozen=True)
class Square(FeatureMap):
    """phi(x) = gain^2 x^2: features that are never negative, one gain a head and feature."""

    word = "conformance_square"

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declaration of ``gain``, (H, D), by default 1."""
        return (Parameter("gain", (("H", "D"),), default=1.0),)

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute phi(x); the gain is squared too, which keeps the kernel positive."""
        return params["gain"] * params["gain"] * x * x

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """Return the cotangents of x and of the parameters, from one of phi(x)."""
        gain = params["gain"]
        return 2.0 * cotangent * gain * gain * x, {"gain": 2.0 * cotangent * gain * x * x}

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        return r"\phi(x)^\top \phi(y),\ \phi = (g \odot x)^2"


@dataclass(frozen=True)
class Dot(FeatureMap):
    """phi(x) = x, so that kappa = x.y takes both signs."""

    word = "conformance_dot"
    signed = True

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Return phi(x) = x."""
        return x

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """Return the cotangents of x and of the parameters, from one of phi(x)."""
        return cotangent, {}

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        return r"x^\top y"


@dataclass(frozen=True)
class Centred(Normalization):
    """T(x) = weight (x - mu) / (1 + var), mu and var of the keys."""

    allow_leak: bool = False
    word = "conformance_centred"

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declaration of ``weight``, (H, D), by default 1."""
        return (Parameter("weight", (("H", "D"),), default=1.0),)

    def statistics_state(self) -> Statistics:
        """Return the moments of the keys."""
        return Moments()

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T(x), see `Normalization.apply`."""
        return params["weight"] * (x - state["mean"]) / (1.0 + state["var"])

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Return the cotangents of x, the state and the parameters."""
        ratio = (x - state["mean"]) / (1.0 + state["var"])
        dx = cotangent * params["weight"] / (1.0 + state["var"])
        return dx, {"mean": -dx, "var": -dx * ratio}, {"weight": cotangent * ratio}

    def latex(self) -> str:
        """Return T as LaTeX."""
        return r"w \odot \frac{x - \mu}{1 + \sigma^2}"


def register() -> None:
    """Register the words, once in a process."""
    if find_kernel(Logistic.word) is None:
        for kernel in (Logistic, Tempered, Placed, Square, Dot):
            register_kernel(kernel)
        register_normalization(Centred)
