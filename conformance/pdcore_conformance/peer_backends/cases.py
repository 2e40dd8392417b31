"""The calls by which the page of the peers compares them, by topic.

The calls have as many queries as keys and as many columns of values as features where the topic
allows it, because several peers take no others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..judge.calls import Arrays, Call

__all__ = ["TOPICS", "Case", "Topic", "drawn"]


class Case(NamedTuple):
    """A call, and how it is judged.

    Attributes
    ----------
    call : Call
    gradients : bool
        Whether the gradients of out are judged, by the framework's automatic differentiation.
    finite : bool
        Whether padding holds 0 in place of NaN.
    """

    call: Call
    gradients: bool = False
    finite: bool = False

    @property
    def label(self) -> str:
        """What tells the case from the others of its topic."""
        more = ["gradients"] * self.gradients + ["padding of 0"] * self.finite
        return ", ".join([self.call.label, *more])


class Topic(NamedTuple):
    """Cases of one subject."""

    name: str
    rule: str
    cases: tuple[Case, ...]


SQUARE = Call(rows=11, value_dim=8)
WIDE = Call(rows=64, keys=512, dim=64, value_dim=64)


def _topic(name: str, rule: str, *calls: Call | Case) -> Topic:
    return Topic(name, rule, tuple(c if isinstance(c, Case) else Case(c) for c in calls))


#: All topics, in the order of the page.
TOPICS = (
    _topic(
        "plain calls",
        "Softmax or linear attention in float32, with one key or many and any scale.",
        SQUARE,
        SQUARE.but(spec="softmax(scale=0.7)"),
        SQUARE.but(lead=(2, 3)),
        SQUARE.but(rows=1, keys=1),
        SQUARE.but(spec="linear"),
        SQUARE.but(spec="causal+linear"),
        SQUARE.but(spec="relu"),
    ),
    _topic(
        "sizes",
        "Other numbers of queries than of keys, of values than of features; no queries, no keys.",
        SQUARE.but(rows=9),
        SQUARE.but(value_dim=5),
        SQUARE.but(rows=0),
        SQUARE.but(keys=0),
    ),
    _topic(
        "large logits",
        "Logits in the hundreds and keys far from 0 overflow nothing and cost no digits.",
        SQUARE.but(draw="loud"),
        SQUARE.but(draw="far"),
        SQUARE.but(draw="loud", spec="softmax(scale=40)"),
    ),
    _topic(
        "rows that see no key",
        "A row that sees no key is 0.",
        SQUARE.but(mask="empty"),
        Case(SQUARE.but(key_mask="none"), finite=True),
        SQUARE.but(spec="causal", offset=-3),
        SQUARE.but(spec="causal", mask="random"),
        SQUARE.but(bias="inf"),
    ),
    _topic(
        "padding",
        "Keys that the padding mask hides have no effect.",
        Case(SQUARE.but(key_mask="right"), finite=True),
        Case(SQUARE.but(key_mask="left", spec="sparse(inf,4)"), finite=True),
        Case(SQUARE.but(key_mask="holes", mask="random"), finite=True),
    ),
    _topic(
        "NaN in padding",
        "Nor have they where they hold NaN.",
        SQUARE.but(key_mask="right"),
        SQUARE.but(key_mask="holes", mask="random"),
    ),
    _topic(
        "causal alignment",
        "Query i sees the keys up to i + offset, whatever the numbers of queries and keys.",
        SQUARE.but(spec="causal"),
        SQUARE.but(spec="causal", rows=9),
        SQUARE.but(spec="causal", rows=11, keys=9),
        SQUARE.but(spec="causal", rows=3, offset="end"),
        SQUARE.but(spec="causal", offset="sequence"),
        SQUARE.but(spec="causal", bias="full"),
    ),
    _topic(
        "windows",
        "sparse(l, r) shows l keys before a query, r after it and its own: l + r + 1.",
        SQUARE.but(spec="sparse(2,1)"),
        SQUARE.but(spec="sparse(0,0)"),
        SQUARE.but(spec="causal+sparse(2,0)"),
        SQUARE.but(spec="sparse(3,inf)"),
        SQUARE.but(spec="sparse(2,1)", rows=6),
    ),
    _topic(
        "grouped heads",
        "Query head i reads key head i // (Hq // Hkv).",
        SQUARE.but(heads=4),
        SQUARE.but(heads=6, mask="heads"),
        SQUARE.but(heads=4, bias="full"),
    ),
    _topic(
        "bias",
        "A bias is added to the scaled scores, broadcast from the right.",
        SQUARE.but(bias="full"),
        SQUARE.but(bias="keys"),
        SQUARE.but(bias="rows"),
        SQUARE.but(bias="full", mask="random"),
    ),
    _topic(
        "softcap",
        "The scaled score s becomes c tanh(s / c), before a bias and a mask.",
        SQUARE.but(spec="softmax(softcap=2)"),
        SQUARE.but(spec="softmax(softcap=2)", mask="random"),
        SQUARE.but(spec="softmax(softcap=2)", bias="full"),
    ),
    _topic(
        "float64",
        "float64 is computed in float64.",
        SQUARE.but(dtype="float64"),
        SQUARE.but(dtype="float64", spec="softmax(scale=0.7)"),
        SQUARE.but(dtype="float64", spec="softmax(softcap=2)"),
        SQUARE.but(dtype="float64", bias="full"),
        SQUARE.but(dtype="float64", spec="causal+linear"),
    ),
    _topic(
        "16 bits",
        "Inputs, weights and the result are rounded to 16 bits, sums are float32.",
        *(
            call.but(dtype=dtype)
            for dtype in ("float16", "bfloat16")
            for call in (
                SQUARE,
                WIDE,
                WIDE.but(draw="far"),
                WIDE.but(bias="full"),
                WIDE.but(rows=512, spec="causal+linear"),
            )
        ),
    ),
    _topic(
        "log-sum-exp",
        "log h is the log of the sum of all visible weights; -inf for a row that sees no key.",
        SQUARE,
        SQUARE.but(draw="loud"),
        SQUARE.but(mask="empty"),
        SQUARE.but(dtype="bfloat16"),
    ),
    _topic(
        "gradients",
        "The gradients of q, k and v.",
        Case(SQUARE, gradients=True),
        Case(SQUARE.but(spec="causal"), gradients=True),
        Case(SQUARE.but(heads=4), gradients=True),
        Case(SQUARE.but(spec="causal+linear"), gradients=True),
    ),
    _topic(
        "gradients of a bias",
        "The gradient of a bias is summed over the axes along which it is broadcast.",
        Case(SQUARE.but(bias="full"), gradients=True),
        Case(SQUARE.but(bias="keys"), gradients=True),
        Case(SQUARE.but(bias="rows"), gradients=True),
    ),
    _topic(
        "gradients beside hidden keys",
        "Rows that see no key and hidden NaN have gradient 0, and spoil no other gradient.",
        Case(SQUARE.but(mask="empty"), gradients=True),
        Case(SQUARE.but(key_mask="right"), gradients=True, finite=True),
        Case(SQUARE.but(key_mask="right"), gradients=True),
    ),
)


def drawn(case: Case) -> Arrays:
    """Draw the inputs of a case."""
    arrays = case.call.arrays()
    if not case.finite:
        return arrays
    return Arrays(arrays.q, np.nan_to_num(arrays.k), np.nan_to_num(arrays.v), arrays.options)
