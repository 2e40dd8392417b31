"""`SilentBackend`: `ArrayBackend` for libraries that are built on NumPy and warn as NumPy does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..lowering import Plan
from .array_backend import ArrayBackend
from .contract import Inputs

__all__ = ["SilentBackend"]


class SilentBackend(ArrayBackend):
    """A backend that runs plans without NumPy's warnings.

    Rows that see no key compute 0 / 0 and log 0, which `ArrayBackend` replaces.
    """

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan, see `Backend.attention`."""
        with np.errstate(all="ignore"):
            return super().attention(plan, inputs, lse=lse)

    def computing(self, x: Any) -> AbstractContextManager[Any]:
        """Return a context without warnings, see `ArrayBackend.computing`."""
        return np.errstate(all="ignore")

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and return its pullback, see `Backend.attention_vjp`."""
        with np.errstate(all="ignore"):
            out, lse, pull = super().attention_vjp(plan, inputs)

        def vjp(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            with np.errstate(all="ignore"):
                return pull(d_out, d_lse)

        return out, lse, vjp

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights of a plan, see `Backend.attention_weights`."""
        with np.errstate(all="ignore"):
            return super().attention_weights(plan, inputs)
