"""Mixture normalization: statistics of sub-populations of the keys, fitted by EM."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...arrays import constant, overflow_as_nan
from ...errors import SpecError
from ..latex_text import latex_number
from ..statistics import KeySet, State, Statistics
from .base import Normalization, check_centre, choices_of_moments

__all__ = ["GaussianMixture", "Mixture", "uniform_draws"]


@dataclass(frozen=True)
class Mixture(Normalization):
    """T(x) = sum_k r_k(x) (x - beta mu_k) / sqrt(var_k + eps): Attention-BN by sub-populations.

    Kalayeh and Shah, Training Faster by Separating Modes of Variation in Batch-normalized Models
    (2019), normalize by the components of a Gaussian mixture instead of by one mean and variance.
    Here the mixture, of diagonal covariances, is fitted by `GaussianMixture` to the real keys of
    the head after head scaling, and r_k(x) is the posterior of component k, for queries and keys
    alike. Weighting the components by r alone, without a factor of their shares, is this
    project's choice. With one component, T is that of `Batch`.

    Parameters
    ----------
    components : int
        K, >= 1.
    steps : int
        EM steps, >= 1.
    seed : int
        The seed of the k-means++ start, >= 0.
    beta, eps : float
        As in `Batch`; eps is also added to every variance of the mixture.
    allow_leak : bool
        Permit statistics of the future under ``causal``.
    """

    components: int = 2
    steps: int = 3
    seed: int = 0
    beta: float = 1.0
    eps: float = 1e-5
    allow_leak: bool = False
    word = "mixture"
    layer = "mixture_norm"

    def __post_init__(self) -> None:
        for name, least in (("components", 1), ("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise SpecError(f"mixture: {name} is {value!r}, expected a whole number >= {least}")
        check_centre(self.word, self.beta, self.eps)

    def statistics_state(self) -> Statistics:
        """Return the mixture of the keys."""
        return GaussianMixture(self.components, self.steps, self.seed, self.eps)

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T(x), see `Normalization.apply`."""
        r = posterior(x, state, self.eps, xp)
        inverse = 1.0 / xp.sqrt(state["var"] + self.eps)
        # Relative to the first centre: products of x itself would cancel far from 0.
        centres = self.beta * state["mean"]
        first = centres[..., :1, :]
        return (x - first) * xp.matmul(r, inverse) - xp.matmul(r, (centres - first) * inverse)

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull a cotangent back, see `Normalization.apply_vjp`."""
        r = posterior(x, state, self.eps, xp)
        dx, dr, dmean, dvar = xp.zeros_like(x), [], [], []
        for k, mean, var in _components(state):
            root = xp.sqrt(var + self.eps)
            z = (x - self.beta * mean) / root
            dz = r[..., k : k + 1] * cotangent / root
            dx = dx + dz
            dr.append(xp.sum(cotangent * z, axis=-1, keepdims=True))
            dmean.append(-self.beta * xp.sum(dz, axis=-2, keepdims=True))
            dvar.append(xp.sum(-0.5 * dz * z / root, axis=-2, keepdims=True))
        dlogits = _softmax_vjp(r, xp.concat(dr, axis=-1), xp)
        dx_logits, dstate = _logits_vjp(x, state, self.eps, dlogits, xp)
        dstate["mean"] = dstate["mean"] + xp.concat(dmean, axis=-2)
        dstate["var"] = dstate["var"] + xp.concat(dvar, axis=-2)
        return dx + dx_logits, dstate, {}

    def statistics_latex(self, key: str) -> str:
        """Return LaTeX that defines the mixture, see `Normalization.statistics_latex`."""
        return (
            rf"\pi_c, \mu_c, \sigma_c^2 \text{{ by {self.steps} steps of EM on the }} {key},\ "
            rf"j \in R \text{{, from centres of seed {self.seed}}}"
        )

    def choices(self, *, pooled: bool) -> Iterator[str]:
        """Yield the choices of this project, see `Normalization.choices`."""
        yield from choices_of_moments(self.eps, weighted=self.beta != 1.0, pooled=pooled)
        yield f"the start of EM, {self.steps} steps, posteriors as weights"

    def latex(self) -> str:
        """Return T as LaTeX."""
        centre = {1.0: r"\mu_c", 0.0: "0"}.get(self.beta, rf"{latex_number(self.beta)}\,\mu_c")
        return (
            rf"\sum_{{c=1}}^{{{self.components}}} r_c(x) \, \frac{{x - {centre}}}"
            rf"{{\sqrt{{\sigma_c^2 + {latex_number(self.eps)}}}}}, \quad r_c(x) \propto \pi_c \, "
            rf"N(x; \mu_c, \sigma_c^2 + {latex_number(self.eps)})"
        )


class GaussianMixture(KeySet):
    """A mixture of Gaussians of diagonal covariance, fitted by EM from a k-means++ start.

    The state of the first round is the keys themselves, as in `KeySet`, since any key may become
    a centre: the start has centres drawn by k-means++, the variance of all keys, and equal shares.
    Each further round is one EM step, whose state has a fixed size and is merged by Chan's update.
    The state has ``mean`` and ``var`` (*B, H, K, D) and ``weight`` (*B, H, K, 1), the number of
    keys times the share of a component.

    Gradients go through the last step only, its posteriors included. The mixture that this step
    starts from, ``from_mean``, ``from_var`` and ``from_weight`` in the state, is a constant.

    Parameters
    ----------
    components, steps, seed, eps
        As in `Mixture`.
    """

    def __init__(self, components: int, steps: int, seed: int, eps: float) -> None:
        self.components, self.seed, self.eps = components, seed, eps
        self.rounds = 1 + steps

    def zero(self, like: State, *, xp: Any) -> State:
        """Return the state of zero keys, see `Statistics.zero`."""
        if "keys" in like:
            return super().zero(like, xp=xp)
        return {name: xp.zeros_like(x) for name, x in like.items()}

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: State | None = None) -> State:
        """Compute the state of one block, see `Statistics.of`."""
        if previous is None:
            return super().of(keys, mask, xp=xp)
        start = {n: constant(previous[n], xp) for n in ("mean", "var", "weight")}
        r = self._posterior(keys, mask, start, xp)
        shares = xp.matrix_transpose(r)
        weight = xp.sum(shares, axis=-1, keepdims=True)
        mean = xp.matmul(shares, keys) / _nonzero(weight, xp)
        squares = [
            _weighted_squares(shares[..., k : k + 1, :], keys, mean[..., k : k + 1, :], xp)
            for k in range(self.components)
        ]
        state = {"weight": weight, "mean": mean, "m2": xp.concat(squares, axis=-2)}
        return {**state, **{f"from_{name}": x for name, x in start.items()}}

    def merge(self, a: State, b: State, *, xp: Any) -> State:
        """Merge two states: sets of keys by concatenation, moments by Chan's update."""
        if "keys" in a:
            return super().merge(a, b, xp=xp)
        weight = a["weight"] + b["weight"]
        share = b["weight"] / _nonzero(weight, xp)
        delta = b["mean"] - a["mean"]
        merged = {
            "weight": weight,
            "mean": a["mean"] + delta * share,
            "m2": a["m2"] + b["m2"] + delta * delta * (a["weight"] * share),
        }
        # All blocks have the same start, but in the neutral element it is zeros.
        for name in ("from_weight", "from_mean", "from_var"):
            merged[name] = xp.where(_has_keys(a, xp), a[name], b[name])
        return merged

    def finalize(self, state: State, *, xp: Any) -> State:
        """Return ``mean``, ``var`` and ``weight``; after the first round, those of the start."""
        if "keys" in state:
            return self._start(state, xp)
        final = {name: x for name, x in state.items() if name != "m2"}
        return {**final, "var": overflow_as_nan(state["m2"] / _nonzero(state["weight"], xp), xp)}

    def vjp(self, keys: Any, mask: Any, final: State, cotangent: State, *, xp: Any) -> Any:
        """Pull ``mean``, ``var`` and ``weight`` back through the last step."""
        start = {name: final[f"from_{name}"] for name in ("mean", "var", "weight")}
        r = self._posterior(keys, mask, start, xp)
        grad, dr = xp.zeros_like(keys), []
        for k, mean, var in _components(final):
            at = slice(k, k + 1)
            weight = final["weight"][..., at, :]
            dmean, dvar = (cotangent[n][..., at, :] / _nonzero(weight, xp) for n in ("mean", "var"))
            deviation = keys - mean
            grad = grad + r[..., at] * (dmean + 2.0 * dvar * deviation)
            moments = xp.sum(
                dmean * deviation + dvar * (deviation * deviation - var), axis=-1, keepdims=True
            )
            dr.append(cotangent["weight"][..., at, :] + moments)
        dlogits = _softmax_vjp(r, xp.concat(dr, axis=-1), xp)
        grad = grad + _logits_vjp(keys, start, self.eps, dlogits, xp)[0]
        return grad if mask is None else xp.where(mask, grad, xp.zeros_like(grad))

    def _posterior(self, keys: Any, mask: Any, start: State, xp: Any) -> Any:
        r = posterior(keys, start, self.eps, xp)
        return r if mask is None else xp.where(mask, r, xp.zeros_like(r))

    def _start(self, state: State, xp: Any) -> State:
        """Draw centres by k-means++, each with probability proportional to the squared distance."""
        keys, real = state["keys"], xp.astype(state["mask"], state["keys"].dtype)
        row = xp.matrix_transpose(real)
        n = xp.sum(real, axis=-2, keepdims=True)
        mean = xp.matmul(row, keys) / _nonzero(n, xp)
        var = overflow_as_nan(_weighted_squares(row, keys, mean, xp) / _nonzero(n, xp), xp)
        ones = xp.ones_like(xp.matrix_transpose(mean))
        centres: list[Any] = []
        nearest = real
        for u in uniform_draws(self.components, self.seed):
            # Where every key is a centre already, the next centre is drawn from all keys.
            distinct = xp.sum(nearest, axis=-2, keepdims=True) > 0
            chance = xp.where(distinct, nearest, real)
            cumulative = xp.cumulative_sum(chance, axis=-2)
            above = cumulative > u * cumulative[..., -1:, :]
            first = above & (xp.cumulative_sum(xp.astype(above, xp.int64), axis=-2) == 1)
            centre = xp.matmul(xp.matrix_transpose(xp.astype(first, keys.dtype)), keys)
            # Distances that overflow draw no centre.
            drawn = xp.sum(chance, axis=-2, keepdims=True) < math.inf
            centre = xp.where(drawn, centre, xp.full_like(centre, math.nan))
            centres.append(centre)
            if len(centres) == self.components:
                break
            deviation = keys - centre
            square = real * xp.matmul(deviation * deviation, ones)
            nearest = xp.minimum(nearest, square) if len(centres) > 1 else square
        equal_weights = [1.0 * n / self.components] * self.components
        return {
            "mean": xp.concat(centres, axis=-2),
            "var": xp.concat([var] * self.components, axis=-2),
            "weight": xp.concat(equal_weights, axis=-2),
        }


def _weighted_squares(shares: Any, keys: Any, mean: Any, xp: Any) -> Any:
    """Sum the squared deviations of keys (*B, H, M, D) by weights (*B, H, 1, M)."""
    deviation = keys - mean
    return xp.matmul(shares, deviation * deviation)


def uniform_draws(count: int, seed: int) -> list[float]:
    """Draw the uniform numbers of k-means++, the same for every sequence and head."""
    generator = random.Random(seed)
    return [generator.random() for _ in range(count)]


def posterior(x: Any, state: State, eps: float, xp: Any) -> Any:
    """Compute r_k(x), (*B, H, R, K), for rows (*B, H, R, D); 0 where no component has weight."""
    columns = []
    for k, mean, var in _components(state):
        weight, spread = state["weight"][..., k : k + 1, :], var + eps
        deviation = x - mean
        logit = xp.log(_nonzero(weight, xp)) - 0.5 * (
            xp.matmul(deviation * deviation, xp.matrix_transpose(1.0 / spread))
            + xp.sum(xp.log(spread), axis=-1, keepdims=True)
        )
        # Not weight > 0, which would hide a NaN.
        columns.append(xp.where(weight == 0, xp.full_like(logit, -math.inf), logit))
    logits = xp.concat(columns, axis=-1)
    top = constant(xp.max(logits, axis=-1, keepdims=True), xp)
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    e = xp.exp(logits - top)
    return e / _nonzero(xp.sum(e, axis=-1, keepdims=True), xp)


def _softmax_vjp(r: Any, cotangent: Any, xp: Any) -> Any:
    return r * (cotangent - xp.sum(r * cotangent, axis=-1, keepdims=True))


def _logits_vjp(
    x: Any, state: State, eps: float, cotangent: Any, xp: Any
) -> tuple[Any, dict[str, Any]]:
    """Pull a cotangent of log(weight_k N(x; mean_k, var_k + eps)) back to x and the mixture."""
    dx, parts = xp.zeros_like(x), []
    for k, mean, var in _components(state):
        d = cotangent[..., k : k + 1]
        scaled = (x - mean) / (var + eps)
        slope = d * scaled
        dx = dx - slope
        dvar = 0.5 * (slope * scaled - d / (var + eps))
        weight = _nonzero(state["weight"][..., k : k + 1, :], xp)
        parts.append([xp.sum(y, axis=-2, keepdims=True) for y in (slope, dvar, d / weight)])
    means, variances, weights = zip(*parts, strict=True)
    return dx, {
        "mean": xp.concat(means, axis=-2),
        "var": xp.concat(variances, axis=-2),
        "weight": xp.concat(weights, axis=-2),
    }


def _components(state: State) -> Iterator[tuple[int, Any, Any]]:
    for k in range(state["mean"].shape[-2]):
        yield k, state["mean"][..., k : k + 1, :], state["var"][..., k : k + 1, :]


def _nonzero(x: Any, xp: Any) -> Any:
    return xp.where(x == 0, xp.ones_like(x), x)


def _has_keys(state: State, xp: Any) -> Any:
    return xp.sum(state["weight"], axis=-2, keepdims=True) != 0
