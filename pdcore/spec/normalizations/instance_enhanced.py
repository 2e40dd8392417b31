"""Instance-enhancement batch normalization: Attention-BN with a gate for every feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels import Parameter
from ..statistics import Moments, State, Statistics
from .base import Normalization, check_centre
from .batch import Batch

__all__ = ["InstanceEnhanced"]


@dataclass(frozen=True)
class InstanceEnhanced(Normalization):
    """T(x) = sigmoid(slope mu + shift) (x - beta mu) / sqrt(var + eps), feature by feature.

    Liang et al., Instance Enhancement Batch Normalization (AAAI 2020), recalibrate the scale of
    batch normalization by a sigmoid of a learned affine of an instance's own mean, for images. An
    instance of attention is here one sequence as one head has it, and its mean that of the head's
    real keys after head scaling, for queries and keys alike; mean and variance of the
    normalization are of the same keys. That is this project's reading, as is the order of
    arguments. With ``slope`` 0 it is `Batch` times sigmoid(shift).

    The call's `params` are ``slope`` and ``shift``, both (Hkv, D).

    Parameters
    ----------
    beta : float
        The weight of the mean, as of `Batch`; the gate has the whole mean.
    eps : float
        Added to the variance, > 0.
    allow_leak : bool
        Permit statistics of the future under ``causal``.
    """

    beta: float = 1.0
    eps: float = 1e-5
    allow_leak: bool = False
    word = "iebn"
    aliases = ("instance_enhanced",)

    @property
    def holds(self) -> str:
        """A constant feature divided by sqrt(eps) may leave the range of float16."""
        return "bfloat16"

    def __post_init__(self) -> None:
        check_centre(self.word, self.beta, self.eps)

    def parameters(self) -> tuple[Parameter, ...]:
        """Declare ``slope`` and ``shift``."""
        return Parameter("slope", (("H", "D"),)), Parameter("shift", (("H", "D"),))

    def statistics_state(self) -> Statistics:
        """Moments."""
        return Moments()

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """T(x), see `Normalization.apply`."""
        return _gate(state, xp, params) * self._batch.apply(x, state, xp=xp, params={})

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull back, see `Normalization.apply_vjp`."""
        gate = _gate(state, xp, params)
        dx, dstate, _ = self._batch.apply_vjp(x, state, gate * cotangent, xp=xp, params={})
        d = cotangent * self._batch.apply(x, state, xp=xp, params={}) * gate * (1.0 - gate)
        moved = {**dstate, "mean": dstate["mean"] + params["slope"] * d}
        return dx, moved, {"slope": d * state["mean"], "shift": d}

    def latex(self) -> str:
        """T as LaTeX."""
        return (
            rf"\mathrm{{sigmoid}}(a \odot \mu + c) \odot {self._batch.latex()}, \quad "
            r"a = \texttt{slope},\ c = \texttt{shift}"
        )

    @property
    def _batch(self) -> Batch:
        return Batch(beta=self.beta, eps=self.eps)


def _gate(state: State, xp: Any, params: Mapping[str, Any]) -> Any:
    # The sigmoid as a tanh, which has no exponential that could overflow.
    return 0.5 * (1.0 + xp.tanh(0.5 * (params["slope"] * state["mean"] + params["shift"])))
