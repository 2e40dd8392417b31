"""The plan that a spec is lowered to: pool -> statistics -> transform -> contraction.

A plan is frozen and holds no arrays. Backends run plans; they never see the axes of a spec.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..spec import Expression, Statistics

if TYPE_CHECKING:
    from ..spec import AttentionSpec, FeatureMap
    from .transforms import Pullback, Rows

__all__ = ["Features", "Group", "Plan", "Scores", "Summary", "Transform"]

Own = TypeVar("Own", bound="Scores")


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
    """

    statistics: Statistics
    scope: str


class Transform(Protocol):
    """A step ``(state, params, rows) -> rows`` in array calls, with its pullback."""

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
    """

    weight: str = "log"
    scale: float = 1.0
    expression: Expression | None = None
    signed: bool = False

    def run_as(self, kind: type[Own], **more: Any) -> Own:
        """Give the contraction as a backend's own kind of it, with what that kind adds."""
        return kind(**{f.name: getattr(self, f.name) for f in fields(Scores)}, **more)


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
    """

    kernel: FeatureMap
    raw: bool = False
    log: bool = False
    signed: bool = False


@dataclass(frozen=True)
class Plan:
    """A spec lowered for one dtype, feature count and number of heads.

    Attributes
    ----------
    spec : AttentionSpec
        What was lowered.
    groups : tuple of Group
        Head groups, which cover all key heads.
    pool : str
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
