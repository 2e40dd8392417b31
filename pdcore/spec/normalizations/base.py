"""Normalizations T(x), which a layer applies to queries and keys before the feature map Phi.

Attention-BN (`Batch`) is the normalization of the paper. Others subclass `Normalization` and are
registered by `pdcore.register_normalization` or the plugin hook ``pdcore_normalizations``, as
`pdcore.plugins.builtin_normalizations` does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import SpecError, UnsupportedError
from ..kernel_base import Parameter
from ..latex_text import latex_number
from ..statistics import State, Statistics

__all__ = ["Identity", "Normalization"]


class Normalization(ABC):
    """A normalization: a frozen dataclass whose fields are the arguments of its word.

    Attributes
    ----------
    word : str
        The name of the normalization in the grammar.
    aliases : tuple of str
        Other names of the normalization.
    layer : str
        The layer of a network whose attention it gives, for `pdcore.derive`; empty where there is
        none.
    causal_choice : str
        The arguments with which ``causal`` accepts the normalization; empty if there are none.
    """

    word: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    layer: ClassVar[str] = ""
    causal_choice: ClassVar[str] = ""

    @property
    def holds(self) -> str:
        """The shortest dtype whose range T(x) never leaves, for rows and keys within that range.

        ``"float16"``; ``"bfloat16"``, the default, where T(x) may leave the range of float16, so
        that kernels read it in float32 for float16 inputs; or ``"float32"``, where T(x) goes to no
        kernel that reads 16-bit rows.
        """
        return "bfloat16"

    @property
    def leaks(self) -> bool:
        """Whether T of one row depends on keys at later positions, which ``causal`` refuses.

        True for a normalization with statistics, unless it has a field `allow_leak` and the
        caller set it to True.
        """
        return self.statistics_state() is not None and not getattr(self, "allow_leak", False)

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declarations of the arrays that the normalization takes from `params`."""
        return ()

    @property
    def training(self) -> Normalization:
        """The normalization with which a layer trains, where another one has running statistics.

        Its statistics, of all keys of a batch, have the names of the parameters that they update.
        """
        return self

    def statistics_state(self) -> Statistics | None:
        """Return the statistics of the keys that `apply` needs, None if it needs none."""
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

        Backends without automatic differentiation refuse gradients of a normalization that does
        not define this method.

        Returns
        -------
        dx : array like `x`
        dstate, dparams : mapping of str to array
            Cotangents of the state and the parameters, not yet summed to their shapes.
        """
        raise UnsupportedError(
            f"{self.word}: apply_vjp is not written, so backends without automatic "
            "differentiation (numpy, cupy) cannot give its gradient"
        )

    def apply_keys(self, keys: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T of the keys, in array-API calls.

        By default the same as `apply`. A normalization overrides it where T of a key depends on
        its neighbours, as in a convolution; a query has no neighbours.

        Parameters
        ----------
        keys : array (*B, H, M, D)
            All keys of a sequence, of which the statistics were taken.
        state, xp, params
            As in `apply`.

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
        """Whether the class defines a pullback for each transform that it defines."""
        cls, base = type(self), Normalization
        has_keys = cls.apply_keys is not base.apply_keys
        has_keys_vjp = cls.apply_keys_vjp is not base.apply_keys_vjp
        return cls.apply_vjp is not base.apply_vjp and (has_keys_vjp or not has_keys)

    def check_keys(self, count: int) -> None:
        """Raise a `ValueError` for a number of keys of one head that T does not accept.

        The keys are counted after head scaling. By default any number is accepted.
        """
        return

    def step(self) -> str:
        """Return the text of this step in a plan."""
        return f"normalize: queries and keys by {self.word}"

    def statistics_latex(self, key: str) -> str | None:
        """Return LaTeX that defines the statistics, by the symbol of key j.

        None, as by default, for moments, or for the name of the statistics alone.
        """
        return None

    def choices(self, *, pooled: bool) -> Iterator[str]:
        """Yield what this project chose where the source of the formula does not, as LaTeX text.

        Parameters
        ----------
        pooled : bool
            Whether some head is fitted on pooled keys.
        """
        yield from ()

    def layer_note(self) -> str:
        """Return a sentence for the derivation of its layer; empty where none is needed."""
        return ""

    @abstractmethod
    def latex(self) -> str:
        """Return T(x) as LaTeX mathematics."""


@dataclass(frozen=True)
class Identity(Normalization):
    """T(x) = x."""

    word = "identity"
    layer = "linear"

    @property
    def holds(self) -> str:
        """T changes nothing."""
        return "float16"

    def apply(self, x: Any, state: State, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute T(x), see `Normalization.apply`."""
        return x

    def apply_vjp(
        self, x: Any, state: State, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Pull a cotangent back, see `Normalization.apply_vjp`."""
        return cotangent, {}, {}

    def latex(self) -> str:
        """Return T as LaTeX."""
        return "x"


def check_centre(word: str, beta: float, eps: float, more: str = "") -> None:
    """Check `beta`, the weight of a mean, and `eps`, which is added to a variance."""
    if not _is_finite(beta):
        raise SpecError(f"{word}: beta is {beta!r}, expected a finite number{more}")
    check_eps(word, eps)


def check_weight(word: str, beta: float | str, eps: float) -> None:
    """Check `beta`, a number or ``"param"``, and `eps`."""
    if beta == "param":
        check_eps(word, eps)
    elif isinstance(beta, str):
        raise SpecError(f"{word}: beta is {beta!r}, expected a number or 'param'")
    else:
        check_centre(word, beta, eps, " or 'param'")


def check_eps(word: str, eps: float) -> None:
    """Check `eps`, which is added to a variance."""
    if not (_is_finite(eps) and eps > 0):
        raise SpecError(f"{word}: eps is {eps!r}, expected a finite number > 0")


def _is_finite(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def choices_of_moments(
    eps: float | None, *, weighted: bool, pooled: bool, statistics: str = "sequence"
) -> Iterator[str]:
    """Yield the choices of a normalization by mean and variance, see `Normalization.choices`.

    Parameters
    ----------
    eps : float or None
        Added to the variance; None for a normalization by the mean alone.
    weighted : bool
        Whether the mean has another weight than 1.
    pooled : bool
        Whether some head is fitted on pooled keys.
    statistics : str
        As in `Batch`.
    """
    if eps is not None:
        yield rf"the value }} {latex_number(eps)} \text{{ added to the variance"
    if weighted:
        yield "the weight of the mean"
    if statistics != "sequence":
        yield f"{statistics} statistics"
    if pooled:
        yield "statistics over pooled keys"
