"""The plan that a spec is lowered to: pool -> statistics -> transform -> contraction.

A plan is frozen and holds no arrays. Backends run plans and never read the spec. Every step has a
slot `choice`, which `lower` leaves None: a backend's `fuse` stores in the slot how the backend runs
the step, as an object that no other backend reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ..spec import PLACES, Expression, Statistics, Support

if TYPE_CHECKING:
    from ..spec import AttentionSpec, FeatureMap
    from .transforms import Pullback, Rows

__all__ = ["Features", "Group", "Plan", "Scores", "Summary", "Transform"]

#: The dtypes in the order of their ranges.
RANGES = ("float16", "bfloat16", "float32", "float64")


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
        Whether statistics are over the keys of a sequence; over all leading axes too; or over
        the keys up to each position.
    choice : object or None
        The slot of the step.
    """

    statistics: Statistics
    scope: str
    choice: Any = None


class Transform(Protocol):
    """A step ``(state, params, rows) -> rows`` in array calls, with its pullback.

    A transform in the slot `choice`, if there is one, is called in place of the step.
    """

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys; see `pdcore.lowering.transforms`."""


@dataclass(frozen=True)
class Scores:
    """The contraction sum_j w_ij v_j with w from s_ij = q'_i . k'_j.

    Attributes
    ----------
    weight : {"log", "features", "log_features"}
        What rows hold: vectors whose inner product s determines log w; features, whose inner
        product is w; or the logarithms of features.
    scale : float
        log w = scale * s, where `expression` is None.
    expression : Expression or None
        log w as a function of s, of scalars per head, of places and of entries of tables.
    signed : bool
        Whether w may be negative; then (out, L) = (sum_j w v_j, 0).
    scalars : tuple of str
        The parameters that `expression` reads: one scalar a head, of `Plan.by_query_head` or not,
        or a table.
    removing : tuple of Expression
        The entries of tables that terms add to log w; one of -inf removes its key.
    choice : object or None
        The slot of the step.
    """

    weight: str = "log"
    scale: float = 1.0
    expression: Expression | None = None
    signed: bool = False
    scalars: tuple[str, ...] = ()
    removing: tuple[Expression, ...] = ()
    choice: Any = None

    @property
    def places(self) -> tuple[str, ...]:
        """Which of `pdcore.spec.PLACES`, distance and labels, `expression` reads."""
        reads = frozenset() if self.expression is None else self.expression.inputs
        return tuple(name for name in PLACES if name in reads)


@dataclass(frozen=True)
class Features:
    """The contraction of phi(q) with sum_j phi(k_j) v_j, in O(N + M).

    Attributes
    ----------
    kernel : FeatureMap
        phi.
    raw : bool
        Whether rows hold x, so that the contraction applies phi. `lower` sets False; a backend's
        `fuse` may set True.
    log : bool
        Whether rows hold log phi.
    signed : bool
        As in `Scores`.
    phi : {"elu", "relu", ""}
        The name of a phi that acts on single entries, ELU + 1 or ReLU; empty for any other phi.
    count : int or None
        The number of features of a row; None where a row has as many as x, or where the number
        is not known.
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
        The spec that was lowered, for its number of heads, for explanations and LaTeX; backends do
        not read the spec.
    groups : tuple of Group
        Head groups, which cover all key heads.
    pool : {"mean", "first"}
        How windows are pooled.
    summary : Summary or None
        The statistics of the pooled keys.
    transforms : tuple of Transform
        The steps, in order, that return q', k', a key bias and a row constant of log kappa.
    contraction : Scores or Features
        The step that returns (out, L).
    normaliser : {"sum", "count", "one"}
        The normaliser h, applied to (out, L).
    sink : float, "param" or None
        The log of what h adds to the sum: a number, or the parameter ``sink`` of the call.
    accumulate : {"float32", "float64"}
        The dtype of sums, statistics and the normaliser.
    steps : tuple of str
        Descriptions of the rewrites, for `explain`.
    support : Support
        The keys that a query may see by position: causal, window.
    holds : {"float16", "bfloat16", "float32"}
        The smallest dtype whose range the transformed queries and keys never leave.
    constants : tuple of str
        Parameters of the call that get no gradient.
    text : str
        The spec and the signature as text, from which `restored` lowers the plan again.
    pool_choice : object or None
        The slot of the pool step.
    by_query_head : tuple of str
        Parameters of the call whose first axis is that of the query heads.
    runs : tuple of (int, int, int)
        The slices (group, start, stop) that, joined, put the heads of the groups in the order of
        all heads. Empty where joining the groups does.
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
    sink: float | str | None = None
    by_query_head: tuple[str, ...] = ()
    runs: tuple[tuple[int, int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", _runs(self.groups))

    @property
    def prefix(self) -> bool:
        """Whether a row's statistics are those of the keys up to the row's position."""
        return self.summary is not None and self.summary.scope == "prefix"

    def fits(self, dtype: str) -> bool:
        """Return whether a dtype has the range of the transformed queries and keys."""
        return RANGES.index(self.holds) <= RANGES.index(dtype)

    @property
    def pools(self) -> bool:
        """Whether some head is fitted on pooled keys."""
        return any(group.scale > 1 for group in self.groups)

    @property
    def rescales(self) -> bool:
        """Whether h changes `out` of the contraction, which needs L."""
        return self.normaliser != "sum" or self.sink is not None

    def chosen(self, contraction: Scores | Features, *steps: str) -> Plan:
        """Return the plan with another contraction, and with steps added for `explain`."""
        return replace(self, contraction=contraction, steps=(*self.steps, *steps))


def _runs(groups: tuple[Group, ...]) -> tuple[tuple[int, int, int], ...]:
    """Return the slices of groups that put all heads in order, see `Plan.runs`."""
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
