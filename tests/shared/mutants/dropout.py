"""Defects of the places by which weights are dropped."""

from __future__ import annotations

from typing import Any

from pdcore.backend import Call, Dropout
from pdcore.lowering import Group, Plan, Scores

from .registry import Unmutated, planted


class _OfBlocks(Dropout):
    def factors(self, start: int, stop: int, first: int, last: int, like: Any, *, xp: Any) -> Any:
        return super().factors(0, stop - start, 0, last - first, like, xp=xp)


@planted("dropout::the_stream_is_the_same_bit_by_bit[300]")
class DropsByThePlaceInABlock(Unmutated):
    """The indices of queries and keys begin at 0 in every block."""

    def scores(self, c: Scores, o: Any) -> tuple[Any, Any]:
        dropout = None if o.dropout is None else _OfBlocks(*o.dropout)
        return super().scores(c, o._replace(dropout=dropout))


class _OfGroups(Call):
    def dropout(self, group: Group) -> Dropout:
        first, second = (x[..., : len(group.heads), :, :] for x in self.lanes)
        return Dropout(self.inputs.dropout, (first, second), group.scale)


@planted("dropout::dropout_is_that_of_the_oracle[sh(1,2,1,2)]")
class DropsByThePlaceInAGroup(Unmutated):
    """The heads of each scale are numbered from 0."""

    def call(self, plan: Plan, inputs: Any, *, level: bool = True) -> Call:
        return _OfGroups(self, plan, inputs, level=level)


@planted("dropout::dropout_is_that_of_the_oracle[sh(3,1,3,1)]")
class DropsByTheNumberOfTheWindow(Unmutated):
    """The index of a pooled key is its number, and not the first position of its window."""

    def scores(self, c: Scores, o: Any) -> tuple[Any, Any]:
        dropout = None if o.dropout is None else o.dropout._replace(scale=1)
        return super().scores(c, o._replace(dropout=dropout))


@planted("dropout::gradients_are_those_of_what_is_kept[softmax]")
class PullbackOfAllWeights(Unmutated):
    """The pullback drops no weight."""

    def scores_vjp(self, c: Scores, o: Any, *rest: Any) -> dict[str, Any]:
        return super().scores_vjp(c, o._replace(dropout=None), *rest)
