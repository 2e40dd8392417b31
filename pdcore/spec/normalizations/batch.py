"""Attention-BN: queries and keys are normalized by the mean and variance of the keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import SpecError, nearest
from ..kernel_base import Parameter
from ..latex_text import latex_number
from ..statistics import Mean, Moments, State, Statistics
from .base import Normalization, check_weight, choices_of_moments

__all__ = ["Batch"]


#: The declaration of beta for ``beta=param``.
BETA = Parameter("beta", (("H",), ("H", "D")), start=1.0)

_STATISTICS = ("sequence", "batch", "running", "prefix")


@dataclass(frozen=True)
class Batch(Normalization):
    """Attention-BN: T(x) = (x - beta mu) / sqrt(var + eps), by the keys' statistics.

    mu and the biased var are taken per feature over the real keys of the head, after head
    scaling (Nguyen et al., 2023). `eps`, the statistics other than ``sequence``, and the weight
    beta as a parameter are choices of this project. With ``with_std=False`` nothing is divided,
    T(x) = x - beta mu: recentred; recalled from the paper, not verified.

    Parameters
    ----------
    beta : float or "param"
        The weight of the mean; ``"param"`` takes an array ``beta`` from the call's `params`.
    eps : float
        Added to the variance, > 0; without division by the deviation only its default is accepted.
    statistics : {"sequence", "batch", "running", "prefix"}
        Which keys the statistics are taken over: those of the sequence; those of all leading
        axes too; none, for ``mean`` and ``var`` in `params`; or, row by row, the keys up to the
        row's position.
    allow_leak : bool
        Permit statistics of the future under ``causal``.
    with_std : bool
        Divide by the deviation. Without division there is no variance: ``running`` statistics are
        a ``mean`` alone.
    """

    beta: float | str = 1.0
    eps: float = 1e-5
    statistics: str = "sequence"
    allow_leak: bool = False
    with_std: bool = True
    word = "bn"
    layer = "batch_norm"
    aliases = ("batch",)
    causal_choice = "statistics=prefix or statistics=running"

    def __post_init__(self) -> None:
        check_weight("bn", self.beta, self.eps)
        if self.statistics not in _STATISTICS:
            raise SpecError(
                f"bn: statistics is {self.statistics!r}; "
                f"{nearest(str(self.statistics), _STATISTICS)}"
            )
        if type(self.with_std) is not bool:
            raise SpecError(f"bn: with_std is {self.with_std!r}, expected True or False")
        if not self.with_std and self.eps != Batch.eps:
            raise SpecError(
                f"bn: eps is {self.eps!r} with with_std=false, which divides by nothing; "
                "leave eps out"
            )

    @property
    def holds(self) -> str:
        """float16, but for prefixes: a short one has a deviation near 0, so its rows are large.

        Rows that are not divided have entries up to |x| + |beta mu|.
        """
        return "float32" if self.statistics == "prefix" and self.with_std else "float16"

    @property
    def leaks(self) -> bool:
        """Whether T depends on later keys: with sequence and batch statistics, unless allowed."""
        return self.statistics in ("sequence", "batch") and not self.allow_leak

    def parameters(self) -> tuple[Parameter, ...]:
        """Return ``beta`` for ``beta=param``, and the running statistics that T needs."""
        declared = []
        if self.beta == "param":
            declared.append(BETA)
        if self.statistics == "running":
            starts = {"mean": 0.0, "var": 1.0} if self.with_std else {"mean": 0.0}
            declared += [
                Parameter(
                    name, (("H", "D"),), differentiable=False, start=start, buffer=f"running_{name}"
                )
                for name, start in starts.items()
            ]
        return tuple(declared)

    @property
    def training(self) -> Batch:
        """The same with ``batch`` statistics in place of running ones."""
        return replace(self, statistics="batch") if self.statistics == "running" else self

    def statistics_state(self) -> Statistics | None:
        """Return moments, or the mean alone; None for running statistics, which are `params`."""
        if self.statistics == "running":
            return None
        return Moments() if self.with_std else Mean()

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T(x), see `Normalization.apply`."""
        moments = params if self.statistics == "running" else state
        centred = x - self.weight(params) * moments["mean"]
        return centred / xp.sqrt(moments["var"] + self.eps) if self.with_std else centred

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull a cotangent back, see `Normalization.apply_vjp`."""
        moments = params if self.statistics == "running" else state
        beta, dx = self.weight(params), cotangent
        dstate = {}
        if self.with_std:
            reciprocal = 1.0 / xp.sqrt(moments["var"] + self.eps)
            dx = cotangent * reciprocal
            centred = x - beta * moments["mean"]
            dstate = {"var": -0.5 * reciprocal * reciprocal * dx * centred}
        dstate = {} if self.statistics == "running" else {"mean": -beta * dx, **dstate}
        dparams = {"beta": -dx * moments["mean"]} if self.beta == "param" else {}
        return dx, dstate, dparams

    def weight(self, params: Mapping[str, Any]) -> Any:
        """Return beta: the number in the spec, or the array in `params`."""
        return params["beta"] if self.beta == "param" else self.beta

    def choices(self, *, pooled: bool) -> Iterator[str]:
        """Yield the choices of this project, see `Normalization.choices`."""
        if not self.with_std:
            yield "recentred, not divided by the deviation (recalled from the paper, not verified)"
        yield from choices_of_moments(
            self.eps if self.with_std else None,
            weighted=self.beta != 1.0,
            pooled=pooled,
            statistics=self.statistics,
        )

    def layer_note(self) -> str:
        """Return what the layer does without division."""
        return "" if self.with_std else "Nothing is divided: T(x) = x - beta mu. "

    def latex(self) -> str:
        """Return T as LaTeX."""
        if isinstance(self.beta, str):
            weight = r"- \beta \odot "
        else:
            size = abs(self.beta)
            sign = "-" if self.beta >= 0 else "+"
            weight = f"{sign} " if size == 1 else rf"{sign} {latex_number(size)}\,"
        index = "_p" if self.statistics == "prefix" else ""
        centred, eps = rf"x {weight}\mu{index}", latex_number(self.eps)
        if not self.with_std:
            return centred
        return rf"\frac{{{centred}}}{{\sqrt{{\sigma^2{index} + {eps}}}}}"
