"""Shapes that models have: wide heads, grouped heads, many sequences, decoding, long contexts."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, judged

#: A layer of a model with heads of 128 features, beyond two blocks of 64 rows or 128 keys.
LAYER = Call(lead=(1,), rows=65, keys=257, dim=128, value_dim=128)
PREFIX = "causal+bn(statistics=prefix)"

test_heads_are_wide = judged(
    "128 and 256 features a head, over several blocks of keys.",
    *(
        LAYER.but(spec=text, dim=dim, value_dim=dim)
        for dim in (128, 256)
        for text in ("softmax", "bn", "linear", "causal", "gaussian(gamma=0.02)", "bn+sh(1,2)")
    ),
    *(LAYER.but(spec=text, dtype=d) for text in ("softmax", "bn", "causal") for d in DTYPES[1:]),
)

test_many_query_heads_share_a_key_head = judged(
    "32 query heads over 8 key heads; 8 query heads a key head.",
    *(
        LAYER.but(spec=text, heads=hq, key_heads=hkv, rows=33, keys=70, dim=64, value_dim=64)
        for hq, hkv in ((32, 8), (16, 2), (8, 1))
        for text in ("softmax", "bn", "linear", "causal", "causal+linear")
    ),
    *(LAYER.but(heads=32, key_heads=8, rows=9, keys=70, dtype=d) for d in DTYPES[1:]),
    *(
        LAYER.but(spec=text, heads=hq, key_heads=4, rows=33, keys=130, dim=64, value_dim=64)
        for hq in (4, 8, 32)
        for text in ("sh(1,1,2,2)", "bn+sh(1,1,2,2)", "causal+sh(1,1,2,2)", "linear+sh(1,1,2,2)")
    ),
)

test_sequences_are_many = judged(
    "More sequences than the powers of two and the threads of small machines.",
    *(
        Call(spec=text, lead=lead, rows=n, keys=n)
        for lead in ((8,), (9,), (17,), (3, 5))
        for n in (11, 65)
        for text in ("softmax", "bn", "linear", "causal", "bn+sh(1,2)", "bn(statistics=batch)")
    ),
    *(Call(lead=(9,), key_mask="right", dtype=d) for d in DTYPES),
)

test_one_query_is_decoded = judged(
    "One query at the end of a long context, with grouped heads.",
    *(
        LAYER.but(
            spec=text,
            lead=(3,),
            heads=hq,
            key_heads=2,
            rows=1,
            keys=m,
            dim=64,
            value_dim=64,
            offset="end",
            key_mask=how,
        )
        for text in ("causal", "causal+linear", "causal+bn(statistics=running)", "sparse(100,0)")
        for hq, m in ((2, 70), (8, 70), (16, 257))
        for how in ("", "right")
    ),
    *(
        Call(spec=text, lead=(1,), heads=8, rows=1, keys=m, dim=16, offset="end", dtype=d)
        for text in ("causal", "bn", "linear")
        for m in (2049, 4100)
        for d in ("float32", "bfloat16")
        if not (text == "linear" and d == "bfloat16")
    ),
    LAYER.but(spec=PREFIX, heads=8, rows=1, offset="end", key_mask="right"),
)

test_lengths_are_one_more_than_blocks = judged(
    "N and M one more than a multiple of 128.",
    *(
        Call(spec=text, lead=(1,), rows=n, keys=m, dim=16, value_dim=16)
        for n, m in ((129, 129), (257, 129), (129, 385), (385, 641))
        for text in ("softmax", "bn", "linear", "causal", "causal+linear", "sh(2,3)", "relu")
    ),
    *(Call(spec="causal", lead=(1,), rows=257, keys=257, dtype=d) for d in DTYPES[1:]),
)

test_pooled_statistics_of_many_keys = judged(
    "Attention-BN+SH over more keys than a block has.",
    *(
        Call(spec=text, lead=lead, rows=65, keys=m, dim=16, key_mask=how)
        for text in ("bn+sh(1,2)", "bn+sh(2,3,pool=first)", "gaussian(gamma=0.1)+bn+sh(1,4)")
        for lead, m in (((2,), 65), ((1,), 200), ((1,), 1030))
        for how in ("", "holes")
    ),
)

test_prefixes_are_long = judged(
    "Prefix statistics over more rows and keys than the blocks of a scan.",
    *(
        Call(spec=text, lead=(1,), rows=n, keys=n, dim=8, key_mask=how)
        for text in (PREFIX, "causal+bn(statistics=prefix)+sh(1,2)", "bn(statistics=prefix)")
        for n in (257, 300)
        for how in ("", "left")
    ),
    Call(spec=PREFIX, lead=(1,), rows=600, keys=600, dim=8),
    Call(spec=PREFIX, lead=(1,), rows=40, keys=560, dim=8, offset="end"),
    *(Call(spec=PREFIX, lead=(1,), rows=257, keys=257, dim=8, dtype=d) for d in DTYPES[1:]),
)
