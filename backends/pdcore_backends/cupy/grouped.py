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

    group: GroupCall
    results: tuple[Any, Any]
    place: tuple[int, int]


def contract(
    groups: Sequence[GroupCall], heads: Sequence[tuple[int, ...]], kernel: ForwardKernel
) -> Contracted:
    """Contract groups, of one kernel `how`, whose key heads are `heads` of the caller's.

    Heads that are equally far apart, in every group, are written where the caller has them.
    """
    steps = [spacing(places) for places in heads]
    known = len({group.dtype for group in groups}) == 1 and None not in steps
    total = sum(map(len, heads))
    whole = groups[0].results(total) if len(groups) > 1 and known else None
    launched = []
    for group, places, step in zip(groups, heads, steps, strict=True):
        x = group.call.packed
        if whole is None:
            results = group.results(x.heads)
            launched.append(_Launched(group, results, (x.heads * x.group, x.group)))
            continue
        at = slice(places[0], places[-1] + 1, step)
        parts = whole[0][..., at, :, :, :], whole[1][..., at, :, :]
        launched.append(_Launched(group, parts, (total * x.group, (step or 1) * x.group)))
    for program, together in _together(launched):
        _launch(program, together, kernel)
    return Contracted([one.results for one in launched], whole)


def _together(groups: Sequence[_Launched]) -> Iterator[tuple[Program, list[_Launched]]]:
    """Give what one launch contracts: groups of a program, those of most keys first."""
    by_program: dict[Program, list[_Launched]] = {}
    for launched in groups:
        program = launched.group.call.program(out=launched.results[0])
        by_program.setdefault(program, []).append(launched)
    for program, members in by_program.items():
        members.sort(key=lambda launched: -launched.group.call.packed.keys)
        for first in range(0, len(members), GROUPS):
            yield program, members[first : first + GROUPS]


def _launch(program: Program, groups: Sequence[_Launched], kernel: ForwardKernel) -> None:
    """Launch a kernel for groups, whose blocks follow one another."""
    arrays: dict[int, Any] = {}  # by their place in the table
    table, blocks = np.zeros((), TABLE), 0
    for i, launched in enumerate(groups):
        x = launched.group.call.packed
        table["x"][i] = record(GROUP, {"place": launched.place, "first": blocks, "shape": x.shape})
        blocks += x.batch * x.heads * x.group * -(-x.rows // kernel.rows)
        pointers = {"inputs": x.arrays, "fold": launched.group.fold, "results": launched.results}
        for name, members in pointers.items():
            start = GROUP.itemsize * i + GROUP.fields[name][1]  # type: ignore[index]
            arrays.update(
                (start + 8 * n, a) for n, a in enumerate(members) if not isinstance(a, np.uint64)
            )
    if not blocks:
        return
    table["count"] = len(groups)
    cache = groups[0].group.call.cache
    compiled = cache.kernel(program, kernel.name, kernel.shared)
    argument = cache.runtime.structure(table[()], arrays)
    compiled((blocks, kernel.slices), (kernel.threads,), (argument,), shared_mem=kernel.shared)


def launches(kinds: Sequence[str]) -> int:
    """Count the launches for groups, each given by what its program is."""
    return sum(-(-kinds.count(kind) // GROUPS) for kind in set(kinds))
