"""The plan that a spec is lowered to: pool -> statistics -> transform -> contraction.

A plan is frozen and holds no arrays. Backends run plans; they never see the axes of a spec. Every
step has a slot `choice`, None as lowered: a backend's `fuse` puts there how it runs the step, in
values of its own, and no other backend reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ..spec import Expression, Statistics, Support

if TYPE_CHECKING:
    from ..spec import AttentionSpec, FeatureMap
    from .transforms import Pullback, Rows

__all__ = ["Features", "Group", "Plan", "Scores", "Summary", "Transform"]


@dataclass(frozen=True)
class Group:
    """Key heads of equal scale, which run as one call.

    Attributes
    ----------
    scale : int
        The length of the pooling window.
    heads : tuple of int
        Indices of key heads.
    """

    scale: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """The statistics step.

    Attributes
    ----------
    statistics : Statistics
        The mergeable state.
    scope : {"sequence", "batch", "prefix"}
        Over the keys of a sequence; over all leading axes too; for every prefix.
    choice : object or None
        The slot of the step.
    """

    statistics: Statistics
    scope: str
    choice: Any = None


class Transform(Protocol):
    """A step ``(state, params, rows) -> rows`` in array calls, with its pullback.

    Its slot `choice`, where it has one, holds a transform that is called in its stead.
    """

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys; see `pdcore.lowering.transforms`."""


@dataclass(frozen=True)
class Scores:
    """The contraction sum_j w_ij v_j with w from s_ij = q'_i . k'_j.

    Attributes
    ----------
    weight : {"log", "features", "log_features"}
        What a row holds: vectors whose inner product gives log w; features, whose inner
        product is w; or log features.
    scale : float
        log w = scale * s, where `expression` is None.
    expression : Expression or None
        log w as a function of s and of scalars per head.
    signed : bool
        Whether w may be negative; then (out, L) = (sum_j w v_j, 0).
    scalars : tuple of str
        The parameters that `expression` reads, one scalar a head.
    choice : object or None
        The slot of the step.
    """

    weight: str = "log"
    scale: float = 1.0
    expression: Expression | None = None
    signed: bool = False
    scalars: tuple[str, ...] = ()
    choice: Any = None


@dataclass(frozen=True)
class Features:
    """The contraction of phi(q) with sum_j phi(k_j) v_j, in O(N + M).

    Attributes
    ----------
    kernel : FeatureMap
        phi.
    raw : bool
        Whether rows hold x, so that phi is the contraction's to apply; never as lowered, only
        by a backend's `fuse`.
    log : bool
        Whether rows hold log phi.
    signed : bool
        As in `Scores`.
    phi : {"elu", "relu", ""}
        Which function of single entries phi is, ELU + 1 or ReLU; empty for any other.
    count : int or None
        The number of features of a row; None where it is that of x, or not known.
    choice : object or None
        The slot of the step.
    """

    kernel: FeatureMap
    raw: bool = False
    log: bool = False
    signed: bool = False
    phi: str = ""
    count: int | None = None
    choice: Any = None


@dataclass(frozen=True)
class Plan:
    """A spec lowered for one dtype, feature count and number of heads.

    Attributes
    ----------
    spec : AttentionSpec
        What was lowered, for explanations and LaTeX; backends do not read it.
    groups : tuple of Group
        Head groups, which cover all key heads.
    pool : {"mean", "first"}
        How windows are pooled.
    summary : Summary or None
        The statistics of the pooled keys.
    transforms : tuple of Transform
        Applied in order; they give q', k', a key bias and a row constant of log kappa.
    contraction : Scores or Features
        Gives (out, L).
    normaliser : {"sum", "count", "one"}
        Applied to (out, L).
    accumulate : {"float32", "float64"}
        The dtype of sums, statistics and the normaliser.
    steps : tuple of str
        The rewrites that were made, for `explain`.
    support : Support
        Causal and window: which keys a query may see by position.
    holds : {"float16", "bfloat16", "float32"}
        The shortest dtype whose range the transformed queries and keys never leave.
    constants : tuple of str
        Parameters of the call that get no gradient.
    text : str
        The spec and the signature, from which `restored` lowers the plan again.
    pool_choice : object or None
        The slot of the pool step.
    runs : tuple of (int, int, int)
        How heads of groups are put in the order of all heads: group, start, stop. Empty where the
        groups follow one another.
    """

    spec: AttentionSpec
    groups: tuple[Group, ...]
    pool: str
    summary: Summary | None
    transforms: tuple[Transform, ...]
    contraction: Scores | Features
    normaliser: str
    accumulate: str
    steps: tuple[str, ...]
    support: Support
    holds: str
    constants: tuple[str, ...]
    text: str
    pool_choice: Any = None
    runs: tuple[tuple[int, int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", _runs(self.groups))

    @property
    def prefix(self) -> bool:
        """Whether every row has statistics of its own, those of the keys up to its position."""
        return self.summary is not None and self.summary.scope == "prefix"

    @property
    def pools(self) -> bool:
        """Whether some head is fitted on pooled keys."""
        return any(group.scale > 1 for group in self.groups)

    def chosen(self, contraction: Scores | Features, *steps: str) -> Plan:
        """Return the plan with another contraction, and with steps added for `explain`."""
        return replace(self, contraction=contraction, steps=(*self.steps, *steps))


def _runs(groups: tuple[Group, ...]) -> tuple[tuple[int, int, int], ...]:
    """List which heads of which group follow one another, see `Plan.runs`."""
    place = {head: (g, i) for g, group in enumerate(groups) for i, head in enumerate(group.heads)}
    if list(place) == sorted(place):
        return ()
    runs: list[tuple[int, int, int]] = []
    for head in sorted(place):
        group, index = place[head]
        if runs and runs[-1][0] == group and runs[-1][2] == index:
            runs[-1] = (group, runs[-1][1], index + 1)
        else:
            runs.append((group, index, index + 1))
    return tuple(runs)
