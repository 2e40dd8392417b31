"""lse, the log of the normalizer h that return_lse returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from ..judge.budget import judge
from ..judge.calls import Arrays, Call
from ..judge.judging import DTYPES, each, judged
from ..judge.layouts import Array
from ..judge.subject import Subject

SMALL = Call()

test_lse_has_every_row_constant = judged(
    "Terms that are constant along a row cancel in out, but are part of lse.",
    *(
        SMALL.but(spec=text, dtype=d)
        for d in DTYPES
        for text in ("bn", "bn(beta=0.5)", "gaussian(gamma=0.3)", "bn+sh(1,2)")
    ),
    SMALL.but(spec="bn", draw="far", dtype="float64"),
    SMALL.but(spec="bn(statistics=running)"),
    SMALL.but(spec="causal+bn(statistics=prefix)"),
    SMALL.but(spec="gaussian(gamma=0.3)+bn"),
    SMALL.but(spec="random_features(count=16)"),
    SMALL.but(spec="polynomial"),
)

test_lse_is_log_h = judged(
    "log sum kappa for h(sum), log n for h(count), 0 for h(one), -inf in a row that sees no key.",
    *(
        SMALL.but(spec=f"{text}{h}", mask="empty")
        for text in ("softmax", "linear", "bn")
        for h in ("", "+h(count)", "+h(one)")
    ),
    SMALL.but(spec="causal", offset=-4),
    SMALL.but(spec="causal+h(count)", offset=-4, rows=11),
    SMALL.but(spec="sh(2,3)+h(count)", key_mask="holes"),
)

MERGED = [
    SMALL.but(spec=text, keys=13, dtype=d)
    for d in ("float32", "float64")
    for text in (
        "softmax",
        "gaussian(gamma=0.3)",
        "linear",
        "cosine",
        "polynomial",
        "softmax+h(count)",
        "softmax+h(one)",
        "bn(statistics=running)",
        "bn(beta=0.5,statistics=running,with_std=false)",
    )
]


def merged_by_lse(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Merge the results over disjoint sets of keys."""
    outs, levels = (np.stack([part[name] for part in parts]) for name in ("out", "lse"))
    lse = np.logaddexp.reduce(levels, axis=0)
    return {"out": (np.exp(levels - lse)[..., None] * outs).sum(0), "lse": lse}


@each(MERGED)
def test_blocks_of_keys_merge(call: Call, subject: Subject) -> None:
    """Results over disjoint keys merge by lse (h sum, count), or by addition (h one)."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = call.arrays()
    parts = []
    for first, last in ((0, 4), (4, 5), (5, 13)):
        part = Arrays(
            arrays.q, arrays.k[..., first:last, :], arrays.v[..., first:last, :], arrays.options
        )
        parts.append(subject.compute(part, call.spec))
    if call.spec.endswith("h(one)"):
        merged = {"out": np.stack([part["out"] for part in parts]).sum(0)}
    else:
        merged = merged_by_lse(parts)
    subject.evidence.add(judge(merged, subject.expected(call, arrays)))


@pytest.mark.claims("lse", "float32", "exponential")
def test_lse_is_given_only_when_asked(subject: Subject) -> None:
    """Without return_lse the result is out alone, within the budget."""
    call = Call()
    arrays = call.arrays()
    alone = subject.compute(arrays, call.spec, lse=False)
    subject.evidence.add(judge(alone, subject.expected(call, arrays)))
