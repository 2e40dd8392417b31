"""Nothing leaks from the future, and decoding step by step is exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ..judge.budget import Expected, judge
from ..judge.calls import Arrays, Call
from ..judge.judging import each
from ..judge.subject import Subject

SMALL = Call(rows=13, keys=13)
CALLS = [
    SMALL.but(spec=text, dtype=d, **how)
    for d, how in (("float32", {}), ("float64", {}), ("float32", {"key_mask": "holes"}))
    for text in (
        "causal",
        "causal+linear",
        "causal+gaussian(gamma=0.3)",
        "causal+random_features(count=16)",
        "causal+bn(statistics=prefix)",
        "causal+bn(statistics=running)",
        "causal+sh(2,4)",
        "causal+sh(2,3,pool=first)",
        "causal+linear+sh(1,4)",
        "causal+sparse(3,inf)",
        "causal+bn(statistics=prefix)+sh(1,3)",
        "causal+h(count)",
        "causal+conv1d(padding=causal)+sh(1,3)",
    )
]


def upto(arrays: Arrays, first: int, last: int, keys: int) -> Arrays:
    """Cut a call down to some queries and the first keys."""
    options = dict(arrays.options)
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"][..., :keys]
    if first:
        options["offset"] = first
    q = arrays.q[..., first:last, :]
    return Arrays(q, arrays.k[..., :keys, :], arrays.v[..., :keys, :], options)


def placed(
    found: Mapping[str, np.ndarray], whole: Expected, first: int, last: int
) -> dict[str, np.ndarray]:
    """Put some rows among the others of the reference, whose head has one budget."""
    out, lse = (whole.low[name].copy() for name in ("out", "lse"))
    out[..., first:last, :], lse[..., first:last] = found["out"], found["lse"]
    return {"out": out, "lse": lse}


def pieces(rows: int) -> Iterator[int]:
    """Choose how far the sequence has come."""
    yield from (1, 2, 3, 4, 5, 8, 9, rows - 1, rows)


@each(CALLS)
def test_beginning_does_not_depend_on_the_rest(call: Call, subject: Subject) -> None:
    """The outputs of x[:m] are the first m outputs of x, for every m."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = call.arrays()
    whole = subject.expected(call, arrays)
    for m in pieces(call.rows):
        found = subject.compute(upto(arrays, 0, m, m), call.spec)
        subject.evidence.add(judge(placed(found, whole, 0, m), whole))


@each(CALLS)
def test_step_by_step_equals_the_whole(call: Call, subject: Subject) -> None:
    """One query at a time, at its offset, over the keys so far: row after row the same."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = call.arrays()
    whole = subject.expected(call, arrays)
    for m in pieces(call.rows):
        found = subject.compute(upto(arrays, m - 1, m, m), call.spec)
        subject.evidence.add(judge(placed(found, whole, m - 1, m), whole))
