"""A pointwise kernel with one parameter per head."""

from __future__ import annotations

from dataclasses import dataclass

from pdcore.extend import Expression, Parameter, PointwiseKernel, default_scale, exp, log, maximum

__all__ = ["Sigmoid"]


@dataclass(frozen=True)
class Sigmoid(PointwiseKernel):
    """kappa = 1 / (1 + exp(-(tau x.y + shift))), with a shift for each head.

    With ``h(one)`` this is sigmoid attention: weights that do not compete.

    Parameters
    ----------
    scale : float, optional
        tau; 1/sqrt(D) by default.
    """

    scale: float | None = None
    word = "sigmoid"

    def parameters(self) -> tuple[Parameter, ...]:
        """Declare ``shift``, (H,), 0 by default."""
        return (Parameter("shift", (("H",),), default=0.0),)

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        """Return log kappa, written so that no exponent is positive."""
        z = default_scale(self.scale, dim) * s + params["shift"]
        return -(maximum(-z, 0.0) + log(1.0 + exp(-abs(z))))

    def latex(self) -> str:
        """Return kappa as LaTeX."""
        tau = r"D^{-1/2}" if self.scale is None else f"{self.scale:g}"
        return rf"\sigma({tau}\, x^\top y + c)"
