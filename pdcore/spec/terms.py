"""Terms of log kappa that are functions of positions: a structured bias, never an (N, M) array."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..errors import SpecError, UnsupportedError
from .expression import Expression, trace
from .heads import HeadScaling
from .kernel_base import Kernel, Parameter

__all__ = ["DISTANCE", "Alibi", "Term", "alibi_slopes", "check_terms"]

#: The name of p_j - p_i, of the positions of a key and of a query, in an expression of log kappa.
DISTANCE = "distance"


class Term(ABC):
    """A term of log kappa: a frozen dataclass whose fields are the arguments of its word.

    Attributes
    ----------
    word : str
        The name of the term in the grammar.
    """

    word: ClassVar[str]

    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declarations of the arrays that the term takes from `params`."""

    @abstractmethod
    def log_kappa(self, distance: Expression, **params: Expression) -> Expression:
        """Return the term as an expression of p_j - p_i and of scalars for each query head."""

    @abstractmethod
    def latex(self) -> str:
        """Return the term as LaTeX mathematics, for query position p and key position j."""

    def expression(self) -> Expression:
        """Trace `log_kappa`."""
        names = tuple(p.name for p in self.parameters())
        return trace(
            lambda d, *values: self.log_kappa(d, **dict(zip(names, values, strict=True))),
            (DISTANCE, *names),
            f"{type(self).__name__}.log_kappa",
        )


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Return the default slopes: 2^(-8 h / n) of n = 2^floor(log2 heads) heads, then between."""
    n = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * h / n) for h in range(1, n + 1)]
    return (*first, *(2.0 ** (-4.0 * (2 * t - 1) / n) for t in range(1, heads - n + 1)))


@dataclass(frozen=True)
class Alibi(Term):
    """Attention with linear biases: -m |p_j - p_i|, m = ``params["slopes"]`` of the query head."""

    word = "alibi"

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the slopes m (Hq,), which a call may leave out."""
        return (Parameter("slopes", (("Hq",),), default=alibi_slopes),)

    def log_kappa(self, distance: Expression, **params: Expression) -> Expression:
        """Return -m |p_j - p_i|."""
        return -params["slopes"] * abs(distance)

    def latex(self) -> str:
        """Return -m |j - p|."""
        return r"-m \, |j - p|"


def check_terms(terms: object, kernel: Kernel, heads: HeadScaling) -> tuple[Term, ...]:
    """Return terms in the order of their words; raise where a spec cannot have them."""
    if not isinstance(terms, tuple) or not all(isinstance(term, Term) for term in terms):
        raise TypeError(f"terms: got {terms!r}, expected a tuple of terms, such as (Alibi(),)")
    ordered = tuple(sorted(terms, key=lambda term: term.word))
    words = [term.word for term in ordered]
    if len(set(words)) != len(words):
        raise SpecError(f"terms: got two of one word in {', '.join(words)}, expected one of each")
    if ordered and not kernel.has_log:
        raise UnsupportedError(
            f"{words[0]}: it is a term of log kappa, and {kernel.word} has no logarithm"
        )
    if ordered and heads.largest > 1:
        raise UnsupportedError(f"{words[0]}: a pooled key has no single position; use scales of 1")
    return ordered
