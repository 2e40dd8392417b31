"""The bias that is added to log kappa."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, judged

SMALL = Call()

test_bias_is_added = judged(
    "The bias multiplies the kernel by exp(bias).",
    *(SMALL.but(bias="full", dtype=d) for d in DTYPES),
    *(
        SMALL.but(spec=text, bias="full")
        for text in (
            "softmax(softcap=2)",
            "gaussian(gamma=0.3)",
            "cosine",
            "polynomial",
            "bn",
            "causal",
            "bn(statistics=running)",
            "causal+bn(statistics=prefix)",
            "softmax+h(one)",
            "conformance_logistic",
        )
    ),
    SMALL.but(bias="full", rows=70, keys=600),
)

test_bias_is_broadcast = judged(
    "A bias may leave out leading axes or have length 1 in any.",
    SMALL.but(bias="keys"),
    SMALL.but(bias="rows"),
    SMALL.but(bias="rows", heads=4),
    SMALL.but(bias="keys", heads=4, spec="bn"),
    *(
        SMALL.but(spec=text, bias=how, lead=lead, heads=4, rows=n, keys=m)
        for how in ("batch", "heads", "sequences")
        for lead in ((3,), (2, 2))
        for text, n, m in (("softmax", 9, 11), ("causal", 33, 129))
    ),
)

test_bias_may_lie_anywhere_in_memory = judged(
    "A bias need not be contiguous.",
    *(
        SMALL.but(bias="strided", rows=n, keys=m, dtype=d)
        for n, m in ((9, 11), (65, 129))
        for d in DTYPES
    ),
)

test_infinite_bias_removes_a_key = judged(
    "A bias of -inf removes a key, also from h(count); a row of -inf sees no key.",
    *(
        SMALL.but(spec=text, bias="inf")
        for text in (
            "softmax",
            "gaussian(gamma=0.3)",
            "polynomial",
            "bn",
            "softmax+h(count)",
            "softmax+h(one)",
            "causal",
        )
    ),
    SMALL.but(bias="inf", dtype="float16"),
)

test_bias_may_be_float32 = judged(
    "A 16-bit call may have a float32 bias, which is not rounded.",
    SMALL.but(bias="float32", dtype="float16"),
    SMALL.but(bias="float32", dtype="bfloat16"),
)
