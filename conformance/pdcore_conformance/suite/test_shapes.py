"""Sizes, axes, their order, and memory layouts."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, full, judged

SMALL = Call()
PLAN = (
    "softmax",
    "bn",
    "linear",
    "sh(1,2)",
    "causal",
    "causal+linear",
    "causal+bn(statistics=prefix)",
)

test_lengths_are_any = judged(
    "Lengths around and far beyond the sizes of blocks.",
    *(
        Call(spec=text, lead=(1,), rows=n, keys=m)
        for text in PLAN[:6]
        for n, m in ((1, 1), (1, 65), (63, 64), (64, 65), (65, 63), (65, 257))
    ),
    *(
        Call(spec=text, lead=(1,), rows=n, keys=m, dim=16)
        for text in ("softmax", "bn", "linear")
        for n, m in ((1, 2000), (33, 2000), (2000, 65))
    ),
    *(
        Call(spec=text, lead=(1,), rows=2000, keys=2000, heads=1, key_heads=1, dim=16, value_dim=16)
        for text in ("causal", "causal+linear")
    ),
    *(
        full(Call(spec="bn", dtype=d, lead=(1,), rows=513, keys=2000, dim=64, value_dim=64))
        for d in DTYPES
    ),
)

test_features_are_any = judged(
    "D and Dv that are 1, odd, different, or large.",
    *(
        SMALL.but(spec=text, dim=d, value_dim=dv)
        for text in ("softmax", "bn", "linear", "gaussian(gamma=0.1)")
        for d, dv in ((1, 1), (3, 7), (17, 1), (1, 33), (64, 64), (80, 96), (128, 32), (256, 5))
    ),
    *(SMALL.but(dim=64, value_dim=64, rows=70, keys=130, dtype=d) for d in DTYPES),
    SMALL.but(value_dim=0),
)

test_leading_axes_are_any = judged(
    "No leading axis, one, two, or one of length 1.",
    *(
        SMALL.but(spec=text, lead=lead)
        for text in PLAN
        for lead in ((), (1,), (3,), (2, 3), (1, 2, 1))
    ),
)

test_empty_sizes_give_empty_or_zero = judged(
    "No query, no key, no sequence: empty results, or zeros.",
    *(SMALL.but(spec=text, rows=0) for text in PLAN),
    *(SMALL.but(spec=text, keys=0) for text in PLAN),
    *(SMALL.but(spec=text, lead=(0,)) for text in PLAN),
    SMALL.but(rows=0, keys=0),
    SMALL.but(keys=0, dtype="float16"),
)

test_query_heads_repeat_key_heads = judged(
    "Query head i uses key head i // (Hq // Hkv), so the heads of a group are adjacent.",
    *(
        SMALL.but(spec=text, heads=hq, key_heads=hkv)
        for hq, hkv in ((4, 2), (6, 3), (6, 2), (4, 1))
        for text in ("softmax", "bn", "linear", "causal")
    ),
    *(SMALL.but(heads=4, dtype=d) for d in DTYPES[1:]),
    SMALL.but(spec="bn+sh(1,2)", heads=6),
    SMALL.but(heads=4, mask="heads"),
    SMALL.but(heads=4, bias="full"),
)

test_memory_layout_does_not_matter = judged(
    "Transposed, sliced, reversed and broadcast views, and read-only arrays.",
    *(
        SMALL.but(spec=text, layout=how, rows=20, keys=24)
        for how in ("transposed", "sliced", "reversed", "broadcast", "packed", "readonly")
        for text in ("softmax", "bn+sh(1,2)", "linear", "causal+linear")
    ),
    *(SMALL.but(layout=how, dtype="float16") for how in ("transposed", "sliced", "broadcast")),
)

BNHD = SMALL.but(heads=4, axes="bnhd")

test_heads_may_follow_length = judged(
    'With layout="bnhd", q, k, v and the result are (*B, N, H, D); masks, bias and lse are not.',
    *(BNHD.but(spec=text) for text in PLAN),
    BNHD.but(dtype="float16", lead=(2, 3)),
    BNHD.but(rows=1, offset="end", key_mask="right"),
    BNHD.but(mask="heads"),
    BNHD.but(bias="full"),
)

test_heads_may_follow_length_vjp = judged(
    'With layout="bnhd", d_out and the cotangents of q, k and v are (*B, N, H, D).',
    BNHD,
    BNHD.but(spec="bn(beta=param)", bias="full"),
    through="vjp",
)

test_heads_may_follow_length_autodiff = judged(
    'With layout="bnhd", the framework\'s gradients of q, k and v are (*B, N, H, D).',
    BNHD,
    BNHD.but(spec="causal+linear"),
    through="autodiff",
)

test_heads_may_follow_length_weights = judged(
    'With layout="bnhd", the weights are (*B, Hq, N, M).',
    BNHD,
    through="weights",
)
