"""A normalization with new statistics, a parameter and a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdcore.extend import Normalization, Parameter, SpecError, Statistics

__all__ = ["KeyRMS", "MeanSquare"]

State = Mapping[str, Any]


class MeanSquare(Statistics):
    """The count of keys and the mean square of each feature."""

    def zero(self, like: State, *, xp: Any) -> State:
        """Return the state of no keys."""
        return {name: xp.zeros_like(value) for name, value in like.items()}

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: State | None = None) -> State:
        """Compute the state of a block of keys."""
        real = xp.ones_like(keys[..., :1]) if mask is None else xp.astype(mask, keys.dtype)
        n = xp.sum(real, axis=-2, keepdims=True)
        n = xp.broadcast_to(n, (*keys.shape[:-2], 1, 1))
        square = keys * keys
        if mask is not None:
            square = xp.where(mask, square, xp.zeros_like(square))
        total = xp.sum(square, axis=-2, keepdims=True)
        return {"n": n, "square": total / _at_least_one(n, xp)}

    def merge(self, a: State, b: State, *, xp: Any) -> State:
        """Merge two states: the mean of the means, weighted by the counts."""
        n = a["n"] + b["n"]
        weight = b["n"] / _at_least_one(n, xp)
        return {"n": n, "square": a["square"] + (b["square"] - a["square"]) * weight}

    def finalize(self, state: State, *, xp: Any) -> State:
        """Return the state unchanged."""
        return state

    def vjp(self, keys: Any, mask: Any, final: State, cotangent: State, *, xp: Any) -> Any:
        """Pull the mean square back: 2 k / n at real keys."""
        grad = 2.0 * keys * (cotangent["square"] / _at_least_one(final["n"], xp))
        return grad if mask is None else xp.where(mask, grad, xp.zeros_like(grad))


@dataclass(frozen=True)
class KeyRMS(Normalization):
    """T(x) = g x / sqrt(r + eps), r the mean square of each feature over the keys.

    Parameters
    ----------
    eps : float
        Added to the mean square, > 0.
    allow_leak : bool
        Permit statistics of the future under ``causal``.
    """

    eps: float = 1e-6
    allow_leak: bool = False
    word = "key_rms"

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise SpecError(f"key_rms: eps is {self.eps!r}, expected a number > 0")

    def parameters(self) -> tuple[Parameter, ...]:
        """Declare ``gain``, (H, D), 1 by default."""
        return (Parameter("gain", (("H", "D"),), default=1.0),)

    def statistics_state(self) -> Statistics:
        """Return the statistics that T reads."""
        return MeanSquare()

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T(x), see `Normalization.apply`."""
        return params["gain"] * x / xp.sqrt(state["square"] + self.eps)

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull back, see `Normalization.apply_vjp`."""
        reciprocal = 1.0 / xp.sqrt(state["square"] + self.eps)
        dx = cotangent * params["gain"] * reciprocal
        return (
            dx,
            {"square": -0.5 * dx * x * reciprocal * reciprocal},
            {"gain": cotangent * x * reciprocal},
        )

    def latex(self) -> str:
        """Return T as LaTeX."""
        return rf"\frac{{g \odot x}}{{\sqrt{{r + {self.eps:g}}}}}"


def _at_least_one(n: Any, xp: Any) -> Any:
    return xp.where(n > 0, n, xp.ones_like(n))
