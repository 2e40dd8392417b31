"""Attention-SH: heads with pooled keys and values."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, judged

SMALL = Call(spec="sh(1,2)", keys=12)

test_keys_and_values_are_pooled = judged(
    "Means, or first keys, of consecutive windows, in every dtype.",
    *(
        SMALL.but(spec=text, dtype=dtype)
        for dtype in DTYPES
        for text in ("sh(1,2)", "sh(2,3)", "sh(2,3,pool=first)", "bn+sh(1,2)", "linear+sh(1,3)")
    ),
)

test_last_window_may_be_short = judged(
    "Where M is no multiple of the scale, the last window pools the remaining keys.",
    *(
        SMALL.but(spec=text, keys=m)
        for m in (1, 2, 3, 7, 10, 11)
        for text in ("sh(2,4)", "sh(3,4,pool=first)", "bn+sh(1,4)")
    ),
    SMALL.but(spec="sh(1,20)", keys=7),
)

test_padding_is_no_part_of_a_pool = judged(
    "The mean of a window is over its real keys; a window without real keys is masked.",
    *(
        SMALL.but(spec=text, key_mask=how)
        for how in ("right", "left", "holes", "one", "none")
        for text in ("sh(2,3)", "sh(2,3,pool=first)", "bn+sh(2,3)", "linear+sh(2,3)")
    ),
    SMALL.but(spec="sh(2,3)+h(count)", key_mask="holes"),
)

test_statistics_are_of_pooled_keys = judged(
    "Attention-BN+SH computes statistics over the pooled keys, each with the same weight.",
    SMALL.but(spec="bn+sh(2,4)", keys=11),
    SMALL.but(spec="bn+sh(2,4,pool=first)", keys=11),
    SMALL.but(spec="bn(statistics=batch)+sh(2,4)", keys=11),
    SMALL.but(spec="bn(statistics=running)+sh(2,4)", keys=11),
    SMALL.but(spec="bn+sh(2,4)", keys=11, key_mask="holes"),
)

test_pooled_key_is_visible_only_as_a_whole = judged(
    "Under causal and window a row sees a pooled key if it may see its whole nominal window.",
    SMALL.but(spec="causal+sh(2,3)", rows=12),
    SMALL.but(spec="causal+sh(2,3,pool=first)", rows=12),
    SMALL.but(spec="sparse(3,3)+sh(2,3)", rows=12),
    SMALL.but(spec="sparse(2,inf)+sh(2,3)", rows=12),
    SMALL.but(spec="causal+sparse(4,inf)+sh(2,3)", rows=12),
    SMALL.but(spec="causal+linear+sh(1,4)", rows=12),
    SMALL.but(spec="causal+sh(2,3)", rows=4, offset=5),
    SMALL.but(spec="causal+sh(2,3)", rows=4, offset="end", key_mask="right"),
)

test_short_window_straddles_the_present = judged(
    "Under causal no row sees the short last window, which is never whole; else every row does.",
    SMALL.but(spec="causal+sh(2,4)", rows=11, keys=11),
    SMALL.but(spec="causal+sh(2,4)", rows=7, keys=7),
    SMALL.but(spec="causal+linear+sh(2,4)", rows=7, keys=7),
    SMALL.but(spec="sh(2,4)", rows=7, keys=7),
    SMALL.but(spec="causal+bn(statistics=prefix)+sh(2,4)", rows=7, keys=7),
    SMALL.but(spec="sparse(5,5)+sh(2,4)", rows=7, keys=7),
    SMALL.but(spec="causal+sh(2,4)", rows=3, keys=7, offset="end"),
)

test_mask_must_allow_every_real_key_of_a_window = judged(
    "A pooled key is masked as soon as the mask forbids one of its real keys.",
    SMALL.but(spec="sh(2,3)", mask="random"),
    SMALL.but(spec="sh(2,3)", mask="keys"),
    SMALL.but(spec="sh(2,3)", mask="random", key_mask="holes"),
    SMALL.but(spec="bn+sh(1,2)", mask="heads"),
    SMALL.but(spec="causal+sh(1,2)", mask="random", rows=12),
)

test_equal_scales_may_lie_anywhere = judged(
    "Heads of one scale may be computed together; the results are in the order of the heads.",
    SMALL.but(spec="sh(2,1,2,1)", heads=4, key_heads=4),
    SMALL.but(spec="bn+sh(3,1,1,3)", heads=8, key_heads=4),
    SMALL.but(spec="bn(beta=param)+sh(2,1,3,1)", heads=4, key_heads=4),
    SMALL.but(spec="sh(2,1,2,1)", heads=4, key_heads=4, mask="heads"),
    SMALL.but(spec="sh(2,1,1,2,2)", heads=5, key_heads=5),
)

test_half_is_the_scale_of_the_last_half = judged(
    "sh(half=s): the last floor(Hkv / 2) key heads have scale s, for any number of key heads.",
    *(SMALL.but(spec="bn+sh(half=2)", heads=hq, key_heads=hkv) for hq, hkv in ((1, 1), (10, 5))),
    SMALL.but(spec="sh(half=3,pool=first)", heads=3, key_heads=3, key_mask="holes"),
    SMALL.but(spec="sh(1*3,2*2)", heads=5, key_heads=5),
)

test_half_is_differentiated = judged(
    "The gradients of sh(half=2) reach the heads that it pools.",
    SMALL.but(spec="sh(half=2)", heads=6, key_heads=3),
    through="vjp",
)

test_long_windows_are_summed_in_float32 = judged(
    "The mean of many 16-bit keys near 100: a sum in 16 bits overflows, or loses every later key.",
    *(
        SMALL.but(spec=text, dtype=dtype, keys=2100, rows=5, draw="far", key_mask=mask)
        for dtype in ("float16", "bfloat16", "float32")
        for text, mask in (("sh(1,700)", ""), ("bn+sh(64,700)", "right"))
    ),
    SMALL.but(spec="sh(2000,1)", dtype="float16", keys=2000, rows=5, draw="loud"),
)
