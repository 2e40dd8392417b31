"""A sink in the normaliser: h(x) = sum kappa + exp(s), with one s for each query head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..judge.budget import judge
from ..judge.calls import Arrays, Call
from ..judge.judging import DTYPES, each, full, judged, specs
from ..judge.subject import Subject
from .test_gradients import both
from .test_lse import merged_by_lse

SMALL = Call(spec="h(sum,sink=param)")

#: Kernels, normalizations, scales and supports, each with a sink.
SPECS = tuple(
    f"{words}+h(sum,sink=param)"
    for words in (
        "softmax(softcap=2)",
        "gaussian(gamma=0.3)",
        "cosine",
        "polynomial",
        "conformance_logistic",
        "bn",
        "gaussian(gamma=0.3)+bn(beta=0.5)",
        "bn(statistics=running)",
        "causal+bn(statistics=prefix)",
        "sh(1,2)",
        "bn+sh(2,3,pool=first)",
        "causal+sh(2,3)",
        "sparse(2,1)",
    )
)

#: Rows that see no key, and sinks that are all of h, or nothing of it.
EDGES = (
    SMALL.but(heads=4, key_heads=1),  # s = -inf in the last head
    SMALL.but(heads=4, mask="empty"),
    SMALL.but(heads=4, key_mask="none"),
    SMALL.but(heads=4, bias="inf"),
    SMALL.but(heads=4, keys=0),
    SMALL.but(spec="causal+h(sum,sink=param)", offset=-4, rows=11, heads=4),
    SMALL.but(spec="causal+bn(statistics=prefix)+h(sum,sink=param)", offset=-4, rows=11),
    SMALL.but(draw="loud"),
    SMALL.but(draw="opposed"),
    SMALL.but(spec="bn+h(sum,sink=param)", draw="far"),
    SMALL.but(spec="h(sum,sink=60)"),
    SMALL.but(spec="h(sum,sink=-60)"),
)

test_sink_is_a_term_of_h = judged(
    "A sink adds exp(s) to h: out is smaller, and lse is log h.",
    SMALL,
    *(SMALL.but(dtype=d, heads=6) for d in DTYPES),
    *(SMALL.but(spec="bn+h(sum,sink=0)", dtype=d) for d in DTYPES),
    *specs(SMALL, *SPECS),
    *EDGES,
    SMALL.but(spec="h(sum,sink=0.5)+sh(1,2)", rows=130, keys=260, dim=16),
    full(SMALL.but(lead=(1,), rows=2000, keys=2000, dim=16, spec="causal+h(sum,sink=param)")),
)

test_sink_is_differentiated, test_autodiff_of_sinks = both(
    "s has a gradient, 0 where s = -inf; out and lse have those of the new h.",
    *(SMALL.but(dtype=d, heads=6) for d in DTYPES),
    SMALL.but(spec="bn+h(sum,sink=0)", dtype="float64"),
    *specs(SMALL, *SPECS[1::3]),
    *EDGES[1::2],
    SMALL.but(spec="sh(1,2)+h(sum,sink=param)", heads=4, rows=130, keys=260, dim=16),
)

test_weights_sum_to_less_than_one = judged(
    "The weights are kappa / h, without the share of the sink.",
    *(SMALL.but(dtype=d, heads=6) for d in DTYPES),
    SMALL.but(spec="bn+sh(1,2)+h(sum,sink=param)"),
    *EDGES[1:4:2],
    through="weights",
)

PAIRED = [SMALL.but(dtype=d, heads=hq, seed=1) for d, hq in (("float32", 2), ("float64", 4))]


@each(PAIRED)
def test_sink_is_a_pair_without_value(call: Call, subject: Subject) -> None:
    """A sink s has the effect of one more key with log kappa = s, and the value 0."""
    if subject.unclaimed([*call.features(lse=True), "bias"]):
        subject.judge(call)
        return
    arrays = call.arrays()
    k, v = (np.concatenate([x, np.zeros_like(x[..., :1, :])], -2) for x in (arrays.k, arrays.v))
    bias = np.zeros((call.heads, 1, call.keys + 1), arrays.q.dtype)
    bias[:, 0, -1] = arrays.options["params"]["sink"]
    paired = subject.compute(Arrays(arrays.q, k, v, {"bias": bias}), "softmax")
    subject.evidence.add(judge(paired, subject.expected(call, arrays)))


MERGED = [
    SMALL.but(spec=f"{text}{sink}", keys=13, dtype=d, heads=4)
    for text, d, sink in (
        ("", "float32", "h(sum,sink=param)"),
        ("", "float64", "h(sum,sink=0.5)"),
        ("gaussian(gamma=0.3)+", "float32", "h(sum,sink=0.5)"),
        ("bn(statistics=running)+", "float64", "h(sum,sink=param)"),
    )
]


@each(MERGED)
def test_sink_enters_one_part(call: Call, subject: Subject) -> None:
    """Results over disjoint keys merge by lse, where exactly one of them has the sink."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = call.arrays()
    parts = []
    for first, last in ((0, 4), (4, 5), (5, 13)):
        spec, options = call.spec, dict(arrays.options)
        if first != 4:
            spec = str(replace(call.parsed, sink=None))
            params = options.get("params", {})
            options["params"] = {name: x for name, x in params.items() if name != "sink"}
        keys, values = (x[..., first:last, :] for x in (arrays.k, arrays.v))
        parts.append(subject.compute(Arrays(arrays.q, keys, values, options), spec))
    subject.evidence.add(judge(merged_by_lse(parts), subject.expected(call, arrays)))
