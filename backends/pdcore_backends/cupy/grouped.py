"""Head groups of different scales by one launch of a forward kernel, the longest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pdcore.extend import Contracted, spacing

from .operands import SHAPE, record
from .programs import Program
from .score_call import ScoreCall

__all__ = ["GROUPS", "GroupCall", "ForwardKernel", "contract", "launches"]

#: Groups of a launch, and `Group` and `Groups` of kernels/groups.cuh, member by member.
GROUPS = 8
GROUP = np.dtype(
    [
        ("inputs", np.uint64, 10),
        ("fold", np.uint64, 3),
        ("results", np.uint64, 2),
        ("place", np.int64, 2),
        ("first", np.int64),
        ("shape", SHAPE),
    ],
    align=True,
)
TABLE = np.dtype([("x", GROUP, GROUPS), ("count", np.int64)], align=True)


class ForwardKernel(NamedTuple):
    """ForwardKernel a forward kernel is launched.

    Attributes
    ----------
    name : str
    rows, threads, shared : int
        Of a block: rows of a query head, threads, and bytes of shared memory.
    slices : int
        Blocks along the columns of the values.
    """

    name: str
    rows: int
    threads: int
    shared: int
    slices: int = 1


class GroupCall(NamedTuple):
    """A group of key heads as it is contracted.

    Attributes
    ----------
    call : ScoreCall
    dtype : dtype
        Of `out`.
    fold : tuple
        What the query load folds in, three arrays; nothing without.
    """

    call: ScoreCall
    dtype: Any
    fold: tuple[Any, ...] = ()

    @classmethod
    def of(cls, call: ScoreCall, rounds: bool, fold: tuple[Any, ...] = ()) -> GroupCall:
        """Give a group whose `out` is of the values' dtype, or with no `rounds` of that of sums."""
        return cls(call, call.o.v.dtype if rounds else call.dtype, fold)

    def results(self, heads: int) -> tuple[Any, Any]:
        """Allocate (out, L) of so many key heads."""
        *lead, _, group, rows, _ = self.call.o.q.shape
        shape = (*lead, heads, group, rows)
        out = self.call.result(*shape, self.call.packed.value_dim, dtype=self.dtype)
        return out, self.call.result(*shape)


class _Launched(NamedTuple):
    """A group with what is written: (out, L), and where its heads are in memory."""

    given: GroupCall
    results: tuple[Any, Any]
    place: tuple[int, int]


def contract(
    groups: Sequence[GroupCall], heads: Sequence[tuple[int, ...]], how: ForwardKernel
) -> Contracted:
    """Contract groups, of one kernel `how`, whose key heads are `heads` of the caller's.

    Heads that are equally far apart, in every group, are written where the caller has them.
    """
    steps = [spacing(chosen) for chosen in heads]
    known = len({group.dtype for group in groups}) == 1 and None not in steps
    total = sum(map(len, heads))
    whole = groups[0].results(total) if len(groups) > 1 and known else None
    found = []
    for given, chosen, step in zip(groups, heads, steps, strict=True):
        x = given.call.packed
        if whole is None:
            own = given.results(x.heads)
            found.append(_Launched(given, own, (x.heads * x.group, x.group)))
            continue
        at = slice(chosen[0], chosen[-1] + 1, step)
        parts = whole[0][..., at, :, :, :], whole[1][..., at, :, :]
        found.append(_Launched(given, parts, (total * x.group, (step or 1) * x.group)))
    for program, together in _together(found):
        _launch(program, together, how)
    return Contracted([one.results for one in found], whole)


def _together(groups: Sequence[_Launched]) -> Iterator[tuple[Program, list[_Launched]]]:
    """Give what one launch contracts: groups of a program, those of most keys first."""
    by_program: dict[Program, list[_Launched]] = {}
    for one in groups:
        program = one.given.call.program(out=one.results[0])
        by_program.setdefault(program, []).append(one)
    for program, found in by_program.items():
        found.sort(key=lambda one: -one.given.call.packed.keys)
        for first in range(0, len(found), GROUPS):
            yield program, found[first : first + GROUPS]


def _launch(program: Program, groups: Sequence[_Launched], how: ForwardKernel) -> None:
    """Launch a kernel for groups, whose blocks follow one another."""
    arrays: dict[int, Any] = {}  # by their place in the table
    table, blocks = np.zeros((), TABLE), 0
    for i, one in enumerate(groups):
        x = one.given.call.packed
        table["x"][i] = record(GROUP, {"place": one.place, "first": blocks, "shape": x.shape})
        blocks += x.batch * x.heads * x.group * -(-x.rows // how.rows)
        given = {"inputs": x.arrays, "fold": one.given.fold, "results": one.results}
        for name, members in given.items():
            start = GROUP.itemsize * i + GROUP.fields[name][1]  # type: ignore[index]
            arrays.update(
                (start + 8 * n, a) for n, a in enumerate(members) if not isinstance(a, np.uint64)
            )
    if not blocks:
        return
    table["count"] = len(groups)
    cache = groups[0].given.call.cache
    kernel = cache.kernel(program, how.name, how.shared)
    argument = cache.runtime.structure(table[()], arrays)
    kernel((blocks, how.slices), (how.threads,), (argument,), shared_mem=how.shared)


def launches(kinds: Sequence[str]) -> int:
    """Count the launches for groups, each given by what its program is."""
    return sum(-(-kinds.count(kind) // GROUPS) for kind in set(kinds))
