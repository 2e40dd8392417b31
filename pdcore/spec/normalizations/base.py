"""Normalizations T(x): what the layer does to queries and keys alike, before Phi.

Attention-BN (`Batch`) is the paper's own. Others subclass `Normalization` and are registered by
`pdcore.register_normalization` or the plugin hook ``pdcore_normalizations``, as are those that
`pdcore.plugins.builtin_normalizations` brings.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import SpecError, UnsupportedError
from ..kernels import Parameter
from ..statistics import State, Statistics

__all__ = ["Identity", "Normalization"]


class Normalization(ABC):
    """A normalization: a frozen dataclass whose fields are the arguments of its word.

    Attributes
    ----------
    word : str
        Its name in the grammar.
    aliases : tuple of str
        Other names for it.
    causal_choice : str
        Which arguments to write instead where ``causal`` refuses it; empty where there are none.
    """

    word: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    causal_choice: ClassVar[str] = ""

    @property
    def holds(self) -> str:
        """The shortest dtype whose range T(x) never leaves, for rows and keys within that range.

        ``"float16"``, ``"bfloat16"``, or ``"float32"``, which promises nothing about 16 bits: there
        T(x) goes to no kernel that reads 16-bit rows.
        """
        return "float32"

    @property
    def leaks(self) -> bool:
        """Whether T of one row depends on keys at later positions, so causal must refuse it.

        True for a normalization that has statistics; an instance that the caller allows to leak
        (a field `allow_leak` set to True) answers False.
        """
        return self.statistics_state() is not None and not getattr(self, "allow_leak", False)

    def parameters(self) -> tuple[Parameter, ...]:
        """Declare the arrays that the normalization takes from `params`."""
        return ()

    def statistics_state(self) -> Statistics | None:
        """Give the mergeable statistic of the keys that `apply` needs, None for none."""
        return None

    @abstractmethod
    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T(x), in array-API calls.

        Parameters
        ----------
        x : array (*B, H, R, D)
            Rows of queries or keys, in the accumulation dtype.
        state : mapping of str to array
            The finalised statistics, broadcastable against `x`.
        xp : namespace
            The array-API namespace.
        params : mapping of str to array
            The declared parameters: (H, 1, 1) for ``("H",)``, (H, 1, D) for ``("H", "D")``,
            others as given.

        Returns
        -------
        array like `x`
        """

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull a cotangent of T(x) back to x, to the state and to the parameters.

        A normalization that leaves this out is refused for gradients on backends without
        automatic differentiation.

        Returns
        -------
        dx : array like `x`
        dstate, dparams : mapping of str to array
            Cotangents; each sums to the shape of what it belongs to.
        """
        raise UnsupportedError(
            f"{self.word}: apply_vjp is not written, so backends without automatic "
            "differentiation (numpy, cupy) cannot give its gradient"
        )

    def apply_keys(self, keys: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T of the keys, in array-API calls.

        By default as of a query. A normalization overrides it where a key has what a query has
        not: neighbours, in a convolution.

        Parameters
        ----------
        keys : array (*B, H, M, D)
            All keys of a sequence, as the statistics saw them.
        state, xp, params
            As of `apply`.

        Returns
        -------
        array like `keys`
        """
        return self.apply(keys, state, xp=xp, params=params)

    def apply_keys_vjp(
        self, keys: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull a cotangent of T of the keys back, as `apply_vjp` does."""
        return self.apply_vjp(keys, state, cotangent, xp=xp, params=params)

    @property
    def has_vjp(self) -> bool:
        """Whether the class writes the pullback of each transform that it writes."""
        cls, base = type(self), Normalization
        own_keys = cls.apply_keys is not base.apply_keys
        pulls_keys = cls.apply_keys_vjp is not base.apply_keys_vjp
        return cls.apply_vjp is not base.apply_vjp and (pulls_keys or not own_keys)

    def check_keys(self, count: int) -> None:
        """Refuse a number of keys of one head, after head scaling, by a `ValueError`."""
        return

    def step(self) -> str:
        """Say in a plan what is done to queries and keys."""
        return f"normalize: queries and keys by {self.word}"

    @abstractmethod
    def latex(self) -> str:
        """Give T(x) as LaTeX mathematics."""


@dataclass(frozen=True)
class Identity(Normalization):
    """T(x) = x."""

    word = "identity"

    @property
    def holds(self) -> str:
        """T changes nothing."""
        return "float16"

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """T(x), see `Normalization.apply`."""
        return x

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull back, see `Normalization.apply_vjp`."""
        return cotangent, {}, {}

    def latex(self) -> str:
        """T as LaTeX."""
        return "x"


def check_centre(word: str, beta: float, eps: float, more: str = "") -> None:
    """Check the weight of a mean, and what is added to a variance."""
    if not _is_finite(beta):
        raise SpecError(f"{word}: beta is {beta!r}, expected a finite number{more}")
    check_eps(word, eps)


def check_eps(word: str, eps: float) -> None:
    """Check what is added to a variance."""
    if not (_is_finite(eps) and eps > 0):
        raise SpecError(f"{word}: eps is {eps!r}, expected a finite number > 0")


def _is_finite(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
