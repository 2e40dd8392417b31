"""Which keys a query sees: causal, windows, offsets, masks and padding."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, full, judged

SMALL = Call()

test_causal_includes_the_present = judged(
    "A query sees the keys at positions up to and including its own.",
    *(
        SMALL.but(spec=text, rows=11, dtype=d)
        for d in DTYPES
        for text in ("causal", "causal+linear", "causal+gaussian(gamma=0.3)")
    ),
    *(
        SMALL.but(spec=text, rows=n, keys=n)
        for n in (1, 2, 65, 130)
        for text in ("causal", "causal+linear", "causal+random_features(count=16)")
    ),
    # Log features far below 0 in every chunk of keys.
    SMALL.but(
        spec="causal+random_features(count=16)",
        dtype="float64",
        rows=130,
        keys=130,
        draw="negative",
    ),
    full(SMALL.but(spec="causal", rows=700, keys=700)),
)

test_causal_is_upper_left = judged(
    "Query 0 is at the position of key 0 for any N and M, unless there is an offset.",
    *(
        SMALL.but(spec=text, rows=n, keys=m)
        for n, m in ((4, 9), (9, 4), (3, 70), (70, 3))
        for text in ("causal", "causal+linear")
    ),
)

test_offset_moves_the_queries = judged(
    "Query i is at position i + offset; the offset is an int, an array, or one per sequence.",
    *(
        SMALL.but(spec=text, offset=offset)
        for offset in (1, 3, -2, 20, -20, "array", "sequence", "end")
        for text in ("causal", "causal+linear", "sparse(2,1)")
    ),
)

test_offset_has_any_integer_dtype = judged(
    "An offset array has any integer dtype; positions may exceed the range of its dtype.",
    *(
        Call(spec=text, rows=40, keys=260, offset=kind, offset_dtype=f"{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
        if sign or bits != 64
        for kind in ("array", "sequence")
        for text in ("causal", "sparse(20,3)", "causal+linear")
    ),
)

test_end_is_the_last_real_key = judged(
    "offset='end' puts the last query at the last real key of each sequence.",
    *(
        SMALL.but(spec=text, offset="end", key_mask=how)
        for how in ("right", "left", "holes", "none")
        for text in ("causal", "causal+linear", "sparse(2,1)")
    ),
    SMALL.but(spec="causal", offset="end", rows=15, keys=6),
    # The last key is the last of a block, so that no block follows.
    *(
        SMALL.but(spec=text, offset="end", key_mask="left", rows=1, keys=m)
        for text in ("causal", "causal+linear", "causal+random_features(count=16)")
        for m in (64, 256)
    ),
)

test_window_reaches_left_and_right = judged(
    "sparse(l, r) lets a query see the keys from l before its position to r after it.",
    *(
        SMALL.but(spec=text, rows=11)
        for text in (
            "sparse(0,0)",
            "sparse(1,2)",
            "sparse(2,1)",
            "sparse(3,inf)",
            "sparse(inf,3)",
            "sparse(2,1)+linear",
            "sparse(2,1)+gaussian(gamma=0.3)",
            "causal+sparse(3,inf)",
            "causal+sparse(3,0)",
            "sparse(inf,0)",
        )
    ),
    SMALL.but(spec="sparse(20,30)", rows=150, keys=150),
    SMALL.but(spec="causal+sparse(20,inf)", rows=150, keys=150),
    SMALL.but(spec="sparse(2,1)", rows=30, keys=5),
    full(SMALL.but(spec="sparse(100,3)", rows=700, keys=700)),
)

LONG = SMALL.but(rows=140, keys=150, heads=4, dim=16)

test_kernels_that_work_in_blocks_keep_it_all = judged(
    "Some frameworks use other kernels for score maps and windows from 128 queries and keys.",
    *(
        LONG.but(spec=text, key_mask=how)
        for how in ("", "holes")
        for text in (
            "softmax(softcap=2)",
            "polynomial",
            "gaussian(gamma=0.3)+sparse(20,7)",
            "bn+sparse(20,7)",
        )
    ),
    LONG.but(spec="causal+sh(1,2)", dtype="bfloat16"),
    *(LONG.but(spec="sparse(20,7)", offset=offset) for offset in (-30, "sequence")),
    LONG.but(spec="sparse(20,7)", mask="heads", bias="inf"),
)

test_mask_is_true_where_a_query_may_attend = judged(
    "True allows attention. The masks of some frameworks mean the opposite.",
    *(
        SMALL.but(spec=text, mask=how)
        for how in ("random", "keys", "heads", "sequences", "rows", "strided")
        for text in ("softmax", "linear", "gaussian(gamma=0.3)", "causal")
    ),
    *(SMALL.but(mask="random", dtype=d) for d in DTYPES[1:]),
    SMALL.but(mask="random", rows=70, keys=600),
)

test_empty_row_is_zero = judged(
    "A row that sees no key gives zeros and an lse of -inf, never NaN.",
    *(SMALL.but(spec=text, mask="empty", dtype=d) for d in DTYPES for text in ("softmax", "bn")),
    *(
        SMALL.but(spec=text, mask="empty")
        for text in (
            "linear",
            "gaussian(gamma=0.3)",
            "polynomial",
            "softmax+h(count)",
            "softmax+h(one)",
            "relu",
            "random_features(count=16)",
        )
    ),
    *(
        SMALL.but(spec=text, offset=-5)
        for text in ("causal", "causal+linear", "causal+bn(statistics=prefix)")
    ),
    *(SMALL.but(spec=text, key_mask="none") for text in ("softmax", "bn", "linear", "sh(2,3)")),
    SMALL.but(spec="sparse(1,1)", offset=40),
)

test_padding_is_ignored = judged(
    "A masked key may hold NaN and does not change the result.",
    *(
        SMALL.but(spec=text, key_mask=how)
        for how in ("right", "left", "holes", "one")
        for text in (
            "softmax",
            "gaussian(gamma=0.3)",
            "cosine",
            "polynomial",
            "linear",
            "relu",
            "random_features(count=16)",
            "causal",
            "causal+linear",
        )
    ),
    *(SMALL.but(key_mask="holes", dtype=d) for d in DTYPES[1:]),
    SMALL.but(key_mask="right", keys=600, rows=40),
)

test_restrictions_combine = judged(
    "A row sees a key if every restriction allows it.",
    SMALL.but(spec="causal", mask="random", key_mask="holes"),
    SMALL.but(spec="causal+sparse(4,inf)", mask="random", key_mask="left", rows=11),
    SMALL.but(spec="sparse(3,3)", bias="inf", mask="random"),
    SMALL.but(spec="causal+linear", key_mask="holes", rows=70, keys=70),
)
