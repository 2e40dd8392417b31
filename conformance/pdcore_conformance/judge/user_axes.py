"""Kernels and a normalization such as a user would write, so that backends are tried on them.

They are registered when the suite starts, and mean nothing outside it.
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

__all__ = ["Centred", "Dot", "Logistic", "Square", "register"]

State = Mapping[str, Any]


@dataclass(frozen=True)
class Logistic(PointwiseKernel):
    """kappa = 1 / (1 + exp(-(tau x.y + shift))), with a shift for each head."""

    scale: float | None = None
    word = "conformance_logistic"

    def parameters(self) -> tuple[Parameter, ...]:
        """Declare ``shift``, (H,), 0 unless given."""
        return (Parameter("shift", (("H",),), default=0.0),)

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        """Log kappa, without overflow on either side."""
        z = default_scale(self.scale, dim) * s + params["shift"]
        return -(maximum(-z, 0.0) + log(1.0 + exp(-abs(z))))

    def latex(self) -> str:
        """Kappa as LaTeX."""
        return r"\sigma(\tau x^\top y + c)"


@dataclass(frozen=True)
class Square(FeatureMap):
    """phi(x) = gain x^2: features that are never negative, with a gain for each head."""

    word = "conformance_square"

    def parameters(self) -> tuple[Parameter, ...]:
        """Declare ``gain``, (H, D), 1 unless given."""
        return (Parameter("gain", (("H", "D"),), default=1.0),)

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Phi(x); the gain is squared too, which keeps the kernel positive."""
        return params["gain"] * params["gain"] * x * x

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """Pull a cotangent of phi back."""
        gain = params["gain"]
        return 2.0 * cotangent * gain * gain * x, {"gain": 2.0 * cotangent * gain * x * x}

    def latex(self) -> str:
        """Kappa as LaTeX."""
        return r"\phi(x)^\top \phi(y),\ \phi = (g \odot x)^2"


@dataclass(frozen=True)
class Dot(FeatureMap):
    """phi(x) = x, so that kappa = x.y takes both signs."""

    word = "conformance_dot"
    signed = True

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Phi(x) = x."""
        return x

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """Pull a cotangent of phi back."""
        return cotangent, {}

    def latex(self) -> str:
        """Kappa as LaTeX."""
        return r"x^\top y"


@dataclass(frozen=True)
class Centred(Normalization):
    """T(x) = gain (x - mu) / (1 + var), by the moments of the keys."""

    allow_leak: bool = False
    word = "conformance_centred"

    def parameters(self) -> tuple[Parameter, ...]:
        """Declare ``weight``, (H, D), 1 unless given."""
        return (Parameter("weight", (("H", "D"),), default=1.0),)

    def statistics_state(self) -> Statistics:
        """Moments."""
        return Moments()

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """T(x), see `Normalization.apply`."""
        return params["weight"] * (x - state["mean"]) / (1.0 + state["var"])

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull back, see `Normalization.apply_vjp`."""
        ratio = (x - state["mean"]) / (1.0 + state["var"])
        dx = cotangent * params["weight"] / (1.0 + state["var"])
        return dx, {"mean": -dx, "var": -dx * ratio}, {"weight": cotangent * ratio}

    def latex(self) -> str:
        """T as LaTeX."""
        return r"w \odot \frac{x - \mu}{1 + \sigma^2}"


def register() -> None:
    """Add the words, once in a process."""
    if find_kernel(Logistic.word) is None:
        for kernel in (Logistic, Square, Dot):
            register_kernel(kernel)
        register_normalization(Centred)
