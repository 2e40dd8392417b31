"""Instance-enhancement batch normalization: Attention-BN with a gate for every feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..kernel_base import Parameter
from ..statistics import Moments, State, Statistics
from .base import Normalization, check_weight, choices_of_moments
from .batch import BETA, Batch

__all__ = ["InstanceEnhanced"]


@dataclass(frozen=True)
class InstanceEnhanced(Normalization):
    """T(x) = sigmoid(slope mu + shift) (x - beta mu) / sqrt(var + eps), feature by feature.

    Liang et al., Instance Enhancement Batch Normalization (AAAI 2020), recalibrate the scale of
    batch normalization by a sigmoid of a learned affine map of the mean of an instance, an image.
    An instance of attention is here one sequence in one head, and mu is the mean of the head's
    real keys after head scaling, for queries and keys alike; the normalization has the mean and
    variance of the same keys. This is this project's reading, as is the order of arguments. With
    ``slope`` 0, T is that of `Batch` times sigmoid(shift).

    The call's `params` are ``slope`` and ``shift``, both (Hkv, D), and ``beta`` if it is a
    parameter. A layer begins with slope 0 and shift -1, as the authors' code does.

    Parameters
    ----------
    beta : float or "param"
        The weight of the mean, as in `Batch`; the gate has the full mean.
    eps : float
        Added to the variance, > 0.
    allow_leak : bool
        Permit statistics of the future under ``causal``.
    """

    beta: float | str = 1.0
    eps: float = 1e-5
    allow_leak: bool = False
    word = "iebn"
    layer = "instance_enhanced_batch_norm"
    aliases = ("instance_enhanced",)

    def __post_init__(self) -> None:
        check_weight(self.word, self.beta, self.eps)

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declarations of ``slope`` and ``shift``, and ``beta`` for ``beta=param``."""
        gate = tuple(
            Parameter(name, (("H", "D"),), start=start)
            for name, start in (("slope", 0.0), ("shift", -1.0))
        )
        return (BETA, *gate) if self.beta == "param" else gate

    def statistics_state(self) -> Statistics:
        """Return the moments of the keys."""
        return Moments()

    def gate(self, mean: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute sigmoid(slope mean + shift), the gate of instances with these means.

        Parameters
        ----------
        mean : array (*B, H, 1, D), or any that broadcasts against the parameters
        xp : namespace
            The array-API namespace.
        params : mapping of str to array
            ``slope`` and ``shift``.

        Returns
        -------
        array like `mean`
        """
        # The sigmoid by a tanh, since the exponential of its usual formula could overflow.
        return 0.5 * (1.0 + xp.tanh(0.5 * (params["slope"] * mean + params["shift"])))

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T(x), see `Normalization.apply`."""
        gate = self.gate(state["mean"], xp=xp, params=params)
        return gate * self._batch.apply(x, state, xp=xp, params=params)

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull a cotangent back, see `Normalization.apply_vjp`."""
        gate = self.gate(state["mean"], xp=xp, params=params)
        dx, dstate, dparams = self._batch.apply_vjp(
            x, state, gate * cotangent, xp=xp, params=params
        )
        d = cotangent * self._batch.apply(x, state, xp=xp, params=params) * gate * (1.0 - gate)
        dstate = {**dstate, "mean": dstate["mean"] + params["slope"] * d}
        return dx, dstate, {**dparams, "slope": d * state["mean"], "shift": d}

    def choices(self, *, pooled: bool) -> Iterator[str]:
        """Yield the choices of this project, see `Normalization.choices`."""
        yield from choices_of_moments(self.eps, weighted=self.beta != 1.0, pooled=pooled)
        yield "an instance is one sequence as one head has it; queries get its gate"

    def latex(self) -> str:
        """Return T as LaTeX."""
        return (
            rf"\mathrm{{sigmoid}}(a \odot \mu + c) \odot {self._batch.latex()}, \quad "
            r"a = \texttt{slope},\ c = \texttt{shift}"
        )

    @property
    def _batch(self) -> Batch:
        return Batch(beta=self.beta, eps=self.eps)
