"""Later keys change no earlier output, and decoding step by step is exact."""

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
        "causal+bn(statistics=prefix,with_std=false)",
        "causal+softmax(softcap=2)+bn(eps=0.1,statistics=prefix)",
        "causal+sh(2,4)",
        "causal+sh(2,3,pool=first)",
        "causal+linear+sh(1,4)",
        "causal+sparse(3,inf)",
        "causal+bn(statistics=prefix)+sh(1,3)",
        "causal+h(count)",
        "causal+conv1d(padding=causal)+sh(1,3)",
    )
]


def beginning(arrays: Arrays, first: int, last: int, keys: int) -> Arrays:
    """Select queries first to last and the first keys of a call."""
    options = dict(arrays.options)
    if "key_mask" in options:
        options["key_mask"] = options["key_mask"][..., :keys]
    if first:
        options["offset"] = first
    q = arrays.q[..., first:last, :]
    return Arrays(q, arrays.k[..., :keys, :], arrays.v[..., :keys, :], options)


def within_reference(
    rows: Mapping[str, np.ndarray], whole: Expected, first: int, last: int
) -> dict[str, np.ndarray]:
    """Replace some rows of the reference's result, as the budget is one for a whole head."""
    out, lse = (whole.low[name].copy() for name in ("out", "lse"))
    out[..., first:last, :], lse[..., first:last] = rows["out"], rows["lse"]
    return {"out": out, "lse": lse}


def lengths(rows: int) -> Iterator[int]:
    """Yield lengths of the beginning of a sequence."""
    yield from (1, 2, 3, 4, 5, 8, 9, rows - 1, rows)


@each(CALLS)
def test_beginning_does_not_depend_on_the_rest(call: Call, subject: Subject) -> None:
    """The outputs of x[:m] are the first m outputs of x, for every m."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = call.arrays()
    whole = subject.expected(call, arrays)
    for m in lengths(call.rows):
        result = subject.compute(beginning(arrays, 0, m, m), call.spec)
        subject.evidence.add(judge(within_reference(result, whole, 0, m), whole))


@each(CALLS)
def test_step_by_step_equals_the_whole(call: Call, subject: Subject) -> None:
    """One query at its offset over the keys so far gives the row of the whole call."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = call.arrays()
    whole = subject.expected(call, arrays)
    for m in lengths(call.rows):
        result = subject.compute(beginning(arrays, m - 1, m, m), call.spec)
        subject.evidence.add(judge(within_reference(result, whole, m - 1, m), whole))
