"""Kernels kappa(x, y), by which an attention compares a query and a key.

A *pointwise* kernel gives log kappa as a function of s = x.y, so it runs as scores. A *feature
map* gives phi with kappa(x, y) = phi(x).phi(y), so it runs in O(N + M). User kernels subclass
`PointwiseKernel` or `FeatureMap` and are registered by `pdcore.register_kernel` or the plugin
hook ``pdcore_kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from ..arrays import device_of, overflow_as_nan
from ..errors import SpecError
from .expression import Expression, log, tanh
from .kernel_base import FeatureMap, FeatureScale, Kernel, Parameter, PointwiseKernel
from .latex_text import latex_number

__all__ = [
    "Cosine",
    "Elu",
    "Exponential",
    "FeatureMap",
    "FeatureScale",
    "Gaussian",
    "Kernel",
    "Parameter",
    "PointwiseKernel",
    "Polynomial",
    "RandomFeatures",
    "Relu",
]


def _positive(word: str, name: str, value: object, *, zero: bool = False) -> None:
    if value is None:
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (math.isfinite(value) and (value > 0 or (zero and value == 0)))
    ):
        bound = "a finite number >= 0" if zero else "a finite number > 0"
        raise SpecError(f"{word}: {name} is {value!r}, expected {bound}")


def default_scale(scale: float | None, dim: int) -> float:
    """Return tau: the scale of the spec, or 1/sqrt(D) without one."""
    return 1.0 / math.sqrt(dim) if scale is None and dim else scale or 1.0


def _tau(scale: float | None) -> str:
    return r"D^{-1/2}" if scale is None else latex_number(scale)


@dataclass(frozen=True)
class Exponential(PointwiseKernel):
    """kappa = exp(tau x.y), or exp(cap tanh(tau x.y / cap)) with `softcap`.

    Parameters
    ----------
    scale : float, optional
        tau; 1/sqrt(D) by default.
    softcap : float, optional
        cap; none by default. A choice of this project, not of the paper.
    """

    scale: float | None = None
    softcap: float | None = None
    word = "softmax"
    aliases = ("exponential",)

    def __post_init__(self) -> None:
        _positive(self.word, "scale", self.scale)
        _positive(self.word, "softcap", self.softcap)

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        """Return log kappa, see `PointwiseKernel.log_kappa`."""
        z = default_scale(self.scale, dim) * s
        return z if self.softcap is None else self.softcap * tanh(z / self.softcap)

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        z = rf"{_tau(self.scale)}\, x^\top y"
        if self.softcap is None:
            return rf"\exp({z})"
        cap = latex_number(self.softcap)
        return rf"\exp({cap} \tanh({z} / {cap}))"


@dataclass(frozen=True)
class Gaussian(Kernel):
    """kappa = exp(-gamma |x - y|^2).

    Parameters
    ----------
    gamma : float
        The inverse squared width, in units of 1/|x|^2.
    """

    gamma: float
    word = "gaussian"
    has_log = True

    def __post_init__(self) -> None:
        _positive(self.word, "gamma", self.gamma)

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        return rf"\exp(-{latex_number(self.gamma)} \lVert x - y \rVert^2)"


@dataclass(frozen=True)
class Cosine(Kernel):
    """kappa = exp(tau x.y / (|x| |y|)); a zero vector has cosine 0 with everything.

    Parameters
    ----------
    scale : float
        tau, 1 by default.
    """

    scale: float = 1.0
    word = "cosine"
    has_log = True

    def __post_init__(self) -> None:
        _positive(self.word, "scale", self.scale)

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        ratio = r"\frac{x^\top y}{\lVert x \rVert \lVert y \rVert}"
        return rf"\exp({latex_number(self.scale)}\, {ratio})"


@dataclass(frozen=True)
class Polynomial(PointwiseKernel):
    """kappa = (tau x.y + coef0)^degree, with an even degree so that kappa >= 0.

    Parameters
    ----------
    degree : int
        An even number, at least 2.
    coef0 : float
        At least 0.
    scale : float, optional
        tau; 1/sqrt(D) by default.
    """

    degree: int = 2
    coef0: float = 1.0
    scale: float | None = None
    word = "polynomial"

    def __post_init__(self) -> None:
        if type(self.degree) is not int or self.degree < 2 or self.degree % 2:
            raise SpecError(
                f"{self.word}: degree is {self.degree!r}, expected an even number >= 2 "
                "(an odd power can be negative)"
            )
        _positive(self.word, "coef0", self.coef0, zero=True)
        _positive(self.word, "scale", self.scale)

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        """Return log kappa, see `PointwiseKernel.log_kappa`."""
        return float(self.degree) * log(abs(default_scale(self.scale, dim) * s + self.coef0))

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        return rf"({_tau(self.scale)}\, x^\top y + {latex_number(self.coef0)})^{{{self.degree}}}"


@dataclass(frozen=True)
class Elu(FeatureMap):
    """phi = elu + 1: exp(x) where x < 0, x + 1 elsewhere (Katharopoulos et al., 2020)."""

    word = "linear"
    aliases = ("elu",)
    #: Rows whose largest entry is at least this have no scale: e^-16 is a product of ordinary size.
    unscaled_from: ClassVar[float] = -8.0

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute phi(x), see `FeatureMap.features`."""
        zero = xp.sum(x[..., :0, :0])  # a scalar 0 of the dtype and device of x
        return xp.exp(xp.minimum(x, zero)) + xp.maximum(x, zero)

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """Pull a cotangent back, see `FeatureMap.features_vjp`."""
        return cotangent * xp.exp(xp.minimum(x, xp.sum(x[..., :0, :0]))), {}

    def feature_scale(self, largest: Any, *, xp: Any) -> FeatureScale:
        """Return m such that phi(x) = exp(m) phi(x - m), see `FeatureMap.feature_scale`."""
        below = (largest < self.unscaled_from) & (largest > -math.inf)
        # Of x - m and of the sum of two m, a whole m costs no digits.
        shift = xp.where(below, xp.ceil(largest), xp.zeros_like(largest))
        return FeatureScale(shift, shift=shift)

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        return r"\phi(x)^\top \phi(y),\ \phi = \mathrm{elu} + 1"


@dataclass(frozen=True)
class Relu(FeatureMap):
    """phi = max(x, 0), with gradient 0 at 0."""

    word = "relu"

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute phi(x), see `FeatureMap.features`."""
        # Not `maximum`, whose gradient at 0 is 1/2 in the frameworks. Not x > 0, which would turn
        # a NaN into 0.
        return xp.where(x <= 0, xp.zeros_like(x), x)

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """Pull a cotangent back, see `FeatureMap.features_vjp`."""
        return xp.where(x <= 0, xp.zeros_like(cotangent), cotangent), {}

    def feature_scale(self, largest: Any, *, xp: Any) -> FeatureScale:
        """Return d such that phi(x) = d phi(x / d), see `FeatureMap.feature_scale`."""
        small = (largest > 0) & (largest < 2.0**-12)
        log = xp.ceil(xp.log(xp.where(small, largest, xp.ones_like(largest))))
        return FeatureScale(log, divisor=xp.exp(log))

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        return r"\phi(x)^\top \phi(y),\ \phi = \max(\cdot, 0)"


@dataclass(frozen=True)
class RandomFeatures(FeatureMap):
    """Positive random features of exp(tau x.y) (Choromanski et al., 2021).

    phi(x) = exp(sqrt(tau) Omega x - tau |x|^2 / 2) / sqrt(count), Omega drawn in float64 by
    ``numpy.random.RandomState(seed).standard_normal((count, D))`` and shared by all heads.

    Parameters
    ----------
    count : int
        The number of features.
    seed : int
        The seed of Omega.
    scale : float, optional
        tau; 1/sqrt(D) by default.
    """

    count: int = 64
    seed: int = 0
    scale: float | None = None
    word = "random_features"
    log_domain = True

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise SpecError(f"{self.word}: count is {self.count!r}, expected an int >= 1")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise SpecError(f"{self.word}: seed is {self.seed!r}, expected 0 <= seed < 2^32")
        _positive(self.word, "scale", self.scale)

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute log phi(x), see `FeatureMap.features`."""
        tau, omega = self._omega(x, xp)
        square = overflow_as_nan(xp.sum(x * x, axis=-1, keepdims=True), xp)
        constant = 0.5 * tau * square + 0.5 * math.log(self.count)
        return xp.matmul(x, xp.matrix_transpose(omega)) - constant

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """Pull a cotangent of log phi back, see `FeatureMap.features_vjp`."""
        tau, omega = self._omega(x, xp)
        return xp.matmul(cotangent, omega) - tau * x * xp.sum(cotangent, axis=-1, keepdims=True), {}

    def _omega(self, x: Any, xp: Any) -> tuple[float, Any]:
        dim = int(x.shape[-1])
        tau = default_scale(self.scale, dim)
        # A namespace has `random_matrix` where its compiler cannot trace NumPy's generator.
        if hasattr(xp, "random_matrix"):
            return tau, xp.random_matrix(self.count, dim, self.seed, math.sqrt(tau), x)
        return tau, like(math.sqrt(tau) * random_matrix(self.count, dim, self.seed), x, xp)

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        z = r"\exp(\sqrt{\tau}\,\Omega x - \tau \lVert x \rVert^2 / 2)"
        return rf"\phi(x)^\top \phi(y),\ \phi = {z} / \sqrt{{{self.count}}}"


@lru_cache(maxsize=32)
def random_matrix(count: int, dim: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Draw Omega, (count, dim), in float64; the cached array is shared, hence read-only."""
    omega = np.random.RandomState(seed).standard_normal((count, dim))
    omega.setflags(write=False)
    return omega


def like(constant: np.ndarray[Any, Any], x: Any, xp: Any) -> Any:
    """Convert a NumPy constant to the library, dtype and device of `x`."""
    if xp.__name__.endswith("numpy"):
        return constant.astype(x.dtype)  # keeps longdouble
    return xp.asarray(np.array(constant), dtype=x.dtype, device=device_of(x))
