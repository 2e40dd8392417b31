"""attention_weights: the only function that builds an (N, M) array."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, judged

SMALL = Call()

test_weights_are_kappa_over_h = judged(
    "The weights times the values are the attention.",
    *(
        SMALL.but(spec=text)
        for text in (
            "softmax",
            "softmax(softcap=2)",
            "gaussian(gamma=0.3)",
            "cosine",
            "polynomial",
            "linear",
            "random_features(count=16)",
            "bn",
            "causal",
            "sparse(2,1)",
            "softmax+h(count)",
            "softmax+h(one)",
            "causal+bn(statistics=prefix)",
        )
    ),
    *(SMALL.but(spec=text, dtype=d) for d in DTYPES[1:] for text in ("softmax", "bn")),
    SMALL.but(mask="empty"),
    SMALL.but(key_mask="holes"),
    SMALL.but(bias="inf"),
    SMALL.but(heads=4),
    through="weights",
)

test_weights_of_long_sequences = judged(
    "Weights of more keys than a block, of grouped heads, and causal.",
    *(
        Call(spec=text, lead=(1,), heads=hq, key_heads=2, rows=n, keys=m, dim=16)
        for text in ("softmax", "causal", "bn", "linear", "sparse(70,3)", "sh(1,4)")
        for hq, n, m in ((2, 65, 130), (8, 129, 257), (4, 1, 2100))
    ),
    Call(bias="full", lead=(1,), rows=300, keys=70, dim=16),
    through="weights",
)

test_weights_of_small_features = judged(
    "Weights of features far below 1, which a backend scales.",
    *(
        SMALL.but(spec=f"{text}{more}", draw=draw, key_mask=how)
        for text, draw in (("linear", "negative"), ("linear", "rising"), ("relu", "tiny"))
        for more in ("", "+causal")
        for how in ("", "holes")
    ),
    # In float32 these weights are as small as kappa, which some processors take for 0.
    *(SMALL.but(spec=f"linear+h({h})", draw="negative", dtype="float64") for h in ("count", "one")),
    SMALL.but(spec="linear", draw="negative", rows=9, keys=300),
    through="weights",
)

test_weight_of_a_pooled_key_is_spread = judged(
    "The weight is equal on the real keys of the window; with pool=first it is on the first key.",
    *(
        SMALL.but(spec=text, key_mask=how)
        for how in ("", "holes", "left")
        for text in ("sh(2,3)", "sh(2,3,pool=first)", "bn+sh(1,4)")
    ),
    SMALL.but(spec="causal+sh(1,3)", rows=11),
    through="weights",
)
