"""Terms of log kappa by positions or labels: a structured bias, never an (N, M) array."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..errors import SpecError, UnsupportedError
from .expression import DISTANCE, KEY_LABEL, PLACES, QUERY_LABEL, Expression, trace
from .heads import HeadScaling
from .kernel_base import Kernel, Parameter

__all__ = ["TERMS", "Alibi", "Labels", "Place", "Relative", "Term", "alibi_slopes", "check_terms"]


class Place(NamedTuple):
    """The symbols of a pair of a query and a key: p_j - p_i, and their labels."""

    distance: Expression
    query_label: Expression
    key_label: Expression


class Term(ABC):
    """A term of log kappa: a frozen dataclass whose fields are the arguments of its word.

    Attributes
    ----------
    word : str
        The name of the term in the grammar.
    places : tuple of str
        Which of ``distance``, ``query_label`` and ``key_label`` it depends on.
    """

    word: ClassVar[str]
    places: ClassVar[tuple[str, ...]]

    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declarations of the arrays that the term takes from `params`."""

    @abstractmethod
    def log_kappa(self, at: Place, **params: Expression) -> Expression:
        """Return the term as an expression of p_j - p_i, of labels and of parameters."""

    @abstractmethod
    def latex(self) -> str:
        """Return the term as LaTeX mathematics, for query position p and key position j."""

    def expression(self) -> Expression:
        """Trace `log_kappa`."""
        names = tuple(p.name for p in self.parameters())
        return trace(
            lambda d, q, k, *values: self.log_kappa(
                Place(d, q, k), **dict(zip(names, values, strict=True))
            ),
            (*PLACES, *names),
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
    places = (DISTANCE,)

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the slopes m (Hq,), which a call may leave out."""
        return (Parameter("slopes", (("Hq",),), default=alibi_slopes, buffer="slopes"),)

    def log_kappa(self, at: Place, **params: Expression) -> Expression:
        """Return -m |p_j - p_i|."""
        return -params["slopes"] * abs(at.distance)

    def latex(self) -> str:
        """Return -m |j - p|."""
        return r"-m \, |j - p|"


@dataclass(frozen=True)
class Relative(Term):
    """A bias by relative positions: an entry of a table for each distance up to `reach`.

    Parameters
    ----------
    reach : int
        The largest distance with an entry of its own; farther keys have that of the end.
    """

    reach: int
    word = "relative"
    places = (DISTANCE,)

    def __post_init__(self) -> None:
        _check_size(self, "reach", 0)

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the table (Hq, 2 reach + 1), whose entry of distance d is at d + reach."""
        return (Parameter("relative", (("Hq", 2 * self.reach + 1),), default=0.0),)

    def log_kappa(self, at: Place, **params: Expression) -> Expression:
        """Return the entry of p_j - p_i."""
        return params["relative"][at.distance + self.reach]

    def latex(self) -> str:
        """Return the entry of j - p."""
        return rf"r_{{\min(\max(j - p, -{self.reach}), {self.reach})}}"


@dataclass(frozen=True)
class Labels(Term):
    """A bias by the labels of query and key, such as an influence between kinds of events.

    Parameters
    ----------
    count : int
        The number of labels, which are 0 .. count - 1.
    """

    count: int
    word = "labels"
    places = (QUERY_LABEL, KEY_LABEL)

    def __post_init__(self) -> None:
        _check_size(self, "count", 1)

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the table (Hq, count, count) or (1, count, count), required."""
        shape = (self.count, self.count)
        return (Parameter("influence", (("Hq", *shape), (1, *shape)), start=0.0),)

    def log_kappa(self, at: Place, **params: Expression) -> Expression:
        """Return the entry of the two labels."""
        return params["influence"][at.query_label, at.key_label]

    def latex(self) -> str:
        """Return the entry of the labels of i and j."""
        return r"I_{l_i l_j}"


#: The terms by their words.
TERMS: dict[str, type[Term]] = {cls.word: cls for cls in (Alibi, Labels, Relative)}


def _check_size(term: Term, name: str, least: int) -> None:
    value = getattr(term, name)
    if type(value) is not int:
        raise TypeError(f"{name}: got {value!r}, expected a whole number")
    if not least <= value <= 2**20:
        raise SpecError(f"{term.word}: {name}: got {value}, expected {least} to {2**20}")


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
    parts: tuple[Any, ...] = (*ordered, kernel)
    placed = [part.word for part in parts if part.places]
    if heads.largest > 1 and placed:
        raise UnsupportedError(
            f"{placed[0]}: a pooled key has no single position or label; use scales of 1"
        )
    return ordered
