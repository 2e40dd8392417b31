"""Head groups of different scales in one launch of a forward kernel, most keys first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pdcore.extend import Contracted, spacing

from .operands import SHAPE, record
from .programs import Program
from .score_call import ScoreCall

__all__ = ["GROUPS", "GroupCall", "ForwardKernel", "contract", "launches"]

#: The most groups of a launch, and `Group` and `Groups` of kernels/groups.cuh, member by member.
GROUPS = 8
GROUP = np.dtype(
    [
        ("inputs", np.uint64, 14),
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
    """A forward kernel and the shape of its launch.

    Attributes
    ----------
    name : str
        The template instantiation.
    rows, threads, shared : int
        Rows of a query head, threads, and bytes of shared memory of a block.
    slices : int
        Blocks along the columns of the values.
    """

    name: str
    rows: int
    threads: int
    shared: int
    slices: int = 1


class GroupCall(NamedTuple):
    """The contraction of one group of key heads.

    Attributes
    ----------
    call : ScoreCall
    dtype : dtype
        The dtype of `out`.
    fold : tuple
        The three arrays of a `QueryFold`; empty without one.
    """

    call: ScoreCall
    dtype: Any
    fold: tuple[Any, ...] = ()

    @classmethod
    def of(cls, call: ScoreCall, rounds: bool, fold: tuple[Any, ...] = ()) -> GroupCall:
        """Return a group; `out` has the dtype of the values with `rounds`, else that of sums."""
        return cls(call, call.o.v.dtype if rounds else call.dtype, fold)

    def results(self, heads: int) -> tuple[Any, Any]:
        """Allocate (out, L) of `heads` key heads."""
        *lead, _, group, rows, _ = self.call.o.q.shape
        shape = (*lead, heads, group, rows)
        out = self.call.result(*shape, self.call.packed.value_dim, dtype=self.dtype)
        return out, self.call.result(*shape)


class _Launched(NamedTuple):
    """A group with its results (out, L), and the strides of its heads in them."""

    group: GroupCall
    results: tuple[Any, Any]
    place: tuple[int, int]


def contract(
    groups: Sequence[GroupCall], heads: Sequence[tuple[int, ...]], kernel: ForwardKernel
) -> Contracted:
    """Contract groups by one kernel; `heads` are the key heads of each group among all heads.

    If the heads of every group are at equal distances, they are written in place in one result of
    all heads.
    """
    steps = [spacing(indices) for indices in heads]
    known = len({group.dtype for group in groups}) == 1 and None not in steps
    total = sum(map(len, heads))
    whole = groups[0].results(total) if len(groups) > 1 and known else None
    launched = []
    for group, indices, step in zip(groups, heads, steps, strict=True):
        x = group.call.packed
        if whole is None:
            results = group.results(x.heads)
            launched.append(_Launched(group, results, (x.heads * x.group, x.group)))
            continue
        at = slice(indices[0], indices[-1] + 1, step)
        parts = whole[0][..., at, :, :, :], whole[1][..., at, :, :]
        launched.append(_Launched(group, parts, (total * x.group, (step or 1) * x.group)))
    for program, members in _by_launch(launched):
        _launch(program, members, kernel)
    return Contracted([group.results for group in launched], whole)


def _by_launch(groups: Sequence[_Launched]) -> Iterator[tuple[Program, list[_Launched]]]:
    """Return the groups of each launch, which share a program, most keys first."""
    by_program: dict[Program, list[_Launched]] = {}
    for launched in groups:
        program = launched.group.call.program(out=launched.results[0])
        by_program.setdefault(program, []).append(launched)
    for program, members in by_program.items():
        members.sort(key=lambda launched: -launched.group.call.packed.keys)
        for first in range(0, len(members), GROUPS):
            yield program, members[first : first + GROUPS]


def _launch(program: Program, groups: Sequence[_Launched], kernel: ForwardKernel) -> None:
    """Launch a kernel for groups; the blocks of a group follow those of the group before."""
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
    """Count the launches for groups; `kinds` names the program of each group."""
    return sum(-(-kinds.count(kind) // GROUPS) for kind in set(kinds))
