"""Attention-BN and its variants: the statistics of the keys, and their use."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, judged

SMALL = Call(spec="bn")
PREFIX = "causal+bn(statistics=prefix)"

test_batch_normalization_is_computed = judged(
    "Attention-BN alone, in every dtype and with every kind of statistics.",
    *(
        SMALL.but(spec=text, dtype=dtype)
        for dtype in DTYPES
        for text in (
            "bn",
            "bn(beta=0.5)",
            "bn(beta=param)",
            "bn(statistics=batch)",
            "bn(statistics=running)",
            "bn(statistics=running,beta=param)",
            "bn(statistics=prefix)",
            PREFIX,
            "gaussian(gamma=0.3)+bn",
            "cosine+bn",
            "linear+bn",
            "conformance_centred",
        )
    ),
)

test_instance_enhancement_is_computed = judged(
    "Attention-BN times the sigmoid of an affine function of the mean of the sequence.",
    *(
        SMALL.but(spec=text, dtype=dtype)
        for dtype in DTYPES
        for text in ("iebn", "iebn(beta=param)", "linear+iebn", "gaussian(gamma=0.3)+iebn")
    ),
    *(SMALL.but(spec="iebn", draw=how) for how in ("far", "constant", "outlier", "loud")),
    *(SMALL.but(spec="iebn", key_mask=how) for how in ("right", "left", "holes", "one", "none")),
    SMALL.but(spec="iebn+sh(1,3)", heads=4, lead=(2, 3)),
    SMALL.but(spec="iebn", mask="random"),
    SMALL.but(spec="iebn(allow_leak=true)+causal", rows=11),
    SMALL.but(spec="iebn", keys=1),
    SMALL.but(spec="iebn", keys=300, rows=70),
)

test_mixture_is_computed = judged(
    "A mixture fitted to the keys by EM, whose start depends on the seed alone.",
    *(
        SMALL.but(spec=text, dtype=dtype, keys=40)
        for dtype in DTYPES
        for text in (
            "mixture",
            "mixture(3,steps=2,seed=7)",
            "linear+mixture",
            "gaussian(gamma=0.3)+mixture(beta=0.5)",
        )
    ),
    *(SMALL.but(spec="mixture(components=1)", dtype=dtype) for dtype in DTYPES),
    # Each step amplifies rounding errors; eps limits that where a component has few keys.
    *(
        SMALL.but(spec="mixture(eps=0.1)", draw=how, keys=40)
        for how in ("far", "constant", "outlier", "loud", "equal")
    ),
    *(
        SMALL.but(spec="mixture(eps=0.1)", key_mask=how)
        for how in ("right", "left", "holes", "one", "none")
    ),
    SMALL.but(spec="mixture(eps=0.1)+sh(1,3)", heads=4, lead=(2, 3), keys=60),
    SMALL.but(spec="mixture", mask="random", keys=40),
    SMALL.but(spec="mixture(allow_leak=true)+causal", rows=40, keys=40),
    SMALL.but(spec="mixture(components=4,eps=0.1)", keys=2),
    SMALL.but(spec="mixture", keys=1),
    SMALL.but(spec="mixture", keys=300, rows=70),
)

test_convolution_is_computed = judged(
    "Keys, not queries, are convolved along the sequence or over a grid, padded with zeros.",
    *(
        SMALL.but(spec=text, dtype=dtype, keys=12)
        for dtype in DTYPES
        for text in ("conv1d", "linear+conv1d(size=4)", "conv2d(3,4)")
    ),
    *(SMALL.but(spec="conv1d", key_mask=how) for how in ("right", "left", "holes", "one", "none")),
    SMALL.but(spec="conv2d(3,4)", keys=12, key_mask="holes"),
    SMALL.but(spec="conv2d(5,4,size=2)+gaussian(gamma=0.3)", keys=20),
    SMALL.but(spec="conv1d(size=4)+sh(1,3)", heads=4, lead=(2, 3)),
    SMALL.but(spec="conv2d(2,3)+sh(2,2)", keys=11),
    SMALL.but(spec="conv1d", mask="random"),
    SMALL.but(spec="conv1d(size=4,padding=causal)+causal", rows=11),
    SMALL.but(spec="conv1d(size=5)", keys=2),
    SMALL.but(spec="conv1d", keys=0),
    SMALL.but(spec="conv1d", draw="outlier"),
    SMALL.but(spec="conv1d", keys=600, rows=70),
    *(SMALL.but(spec="conv1d", dtype=dtype, given=False) for dtype in DTYPES[:2]),
)

test_prefix_statistics_are_of_every_kernel_of_inner_products = judged(
    "T of a row and of its keys differs from row to row, which is one more feature of the scores.",
    *(
        SMALL.but(spec=f"{kernel}+{text}", dtype=dtype, rows=11)
        for dtype in DTYPES
        for kernel in ("softmax(softcap=2)", "polynomial", "conformance_logistic")
        for text in (
            "causal+bn(eps=0.1,statistics=prefix)",
            "bn(beta=param,statistics=prefix,with_std=false)",
        )
    ),
    *(
        SMALL.but(spec="softmax(softcap=2)+causal+bn(eps=0.1,statistics=prefix)", **how)
        for how in (
            {"key_mask": "holes"},
            {"key_mask": "left"},
            {"offset": "sequence"},
            {"mask": "random"},
            {"bias": "full"},
            {"draw": "far"},
            {"rows": 150, "keys": 150},
            {"heads": 6},
        )
    ),
    SMALL.but(spec="softmax(softcap=2)+bn(eps=0.1,statistics=prefix)+sh(2,3)", rows=11),
)

RECENTRED = "bn(with_std=false)"
AWAY = SMALL.but(draw="away", rows=40, keys=64, dim=32, value_dim=32)

test_recentring_divides_by_nothing = judged(
    "Attention-BN without division, in every dtype and with every kind of statistics.",
    *(
        SMALL.but(spec=text, dtype=dtype)
        for dtype in DTYPES
        for text in (
            RECENTRED,
            "bn(beta=param,with_std=false)",
            "bn(beta=0.5,statistics=batch,with_std=false)",
            "bn(statistics=running,with_std=false)",
            "bn(statistics=running,beta=param,with_std=false)",
            "bn(statistics=prefix,with_std=false)",
            "causal+bn(beta=0.5,statistics=prefix,with_std=false)",
            "bn(with_std=false)+sh(1,3)",
            "softmax(softcap=2)+bn(with_std=false)",
            "gaussian(gamma=0.3)+bn(beta=param,statistics=batch,with_std=false)",
            "cosine+bn(with_std=false)",
            "linear+bn(with_std=false)",
        )
    ),
    *(SMALL.but(spec=RECENTRED, draw=how) for how in ("constant", "equal", "outlier", "loud")),
    *(
        SMALL.but(spec=text, key_mask=how)
        for how in ("right", "left", "holes", "one", "none")
        for text in (RECENTRED, "causal+bn(statistics=prefix,with_std=false)")
    ),
    SMALL.but(spec=RECENTRED, mask="random"),
    SMALL.but(spec=RECENTRED, keys=1),
    SMALL.but(spec=RECENTRED, heads=6, lead=(2, 3)),
    SMALL.but(spec="bn(statistics=prefix,with_std=false)", offset="sequence", rows=11),
)

test_recentring_costs_no_digits_far_from_zero = judged(
    "Keys of mean 100: what the rounding of a query does to all its scores must not reach lse.",
    *(
        AWAY.but(spec=text, dtype=dtype)
        for dtype in DTYPES
        for text in (
            RECENTRED,
            "bn(statistics=batch,with_std=false)",
            "causal+bn(statistics=prefix,with_std=false)",
            "bn(with_std=false)+sh(1,2)",
            "bn(with_std=false)+h(sum,sink=5)",
        )
    ),
)

test_any_normalization_is_rounded_near_zero = judged(
    "A normalization that declares nothing runs in 16 bits, and its keys are rounded near 0.",
    *(
        SMALL.but(spec=text, dtype=dtype, draw="away", keys=40, dim=32, value_dim=32)
        for dtype in DTYPES[2:]
        for text in ("conformance_centred", "iebn", "mixture(eps=0.1)", "conv1d")
    ),
)

test_variance_is_biased = judged(
    "The variance divides by n, not n - 1, which differ most with 2 or 3 keys.",
    *(SMALL.but(dtype=d, keys=n) for d in DTYPES for n in (2, 3)),
    SMALL.but(spec=PREFIX, keys=3, rows=3),
    SMALL.but(spec="bn(statistics=batch)", keys=2),
)

test_eps_is_that_of_the_spec = judged(
    "A constant feature has variance 0, so its scale depends on eps alone.",
    *(SMALL.but(dtype=d, draw="constant", dim=2) for d in ("float32", "float64")),
    SMALL.but(spec="bn(eps=0.1)"),
    SMALL.but(spec="bn(eps=1e-7)", dtype="float64", keys=2),
    SMALL.but(spec="gaussian(gamma=0.1)+bn(eps=0.5)"),
)

test_variance_needs_two_passes = judged(
    "Keys of mean 100 and deviation 0.1: E[x^2] - E[x]^2 has no correct digit in float32.",
    *(
        SMALL.but(spec=text, draw="far", dtype=d, keys=200)
        for d in ("float32", "float64")
        for text in ("bn", "bn(statistics=batch)", "linear+bn", "gaussian(gamma=0.3)+bn")
    ),
    SMALL.but(spec=PREFIX, draw="far", rows=40, keys=40),
    SMALL.but(draw="far", dtype="float16", keys=64),
    SMALL.but(draw="far", dtype="bfloat16", keys=64),
)

test_statistics_survive_an_outlier_first_key = judged(
    "The first key is an outlier, which makes sums inexact that are shifted by it.",
    *(SMALL.but(spec=text, draw="outlier", keys=100) for text in ("bn", "linear+bn", PREFIX)),
)

test_constant_feature_is_finite = judged(
    "A feature has variance 0, and float16 cannot represent 1 / (var + eps).",
    *(
        SMALL.but(spec=text, draw="constant", dtype=d)
        for d in DTYPES
        for text in ("bn", PREFIX, "bn(statistics=batch)")
    ),
)

test_one_key_has_no_variance = judged(
    "With n = 1 the variance is 0, T of the key is 0, and nothing is NaN.",
    *(
        SMALL.but(spec=text, keys=1, dtype=d)
        for d in DTYPES
        for text in ("bn", "linear+bn", "bn(statistics=batch)")
    ),
    *(SMALL.but(spec=PREFIX, keys=5, rows=5, dtype=d) for d in DTYPES),
)

test_padding_is_no_part_of_statistics = judged(
    "key_mask removes a key from the mean, the variance and their count.",
    *(
        SMALL.but(spec=text, key_mask=how)
        for how in ("right", "left", "holes", "one", "none")
        for text in ("bn", "bn(statistics=batch)", "linear+bn", "bn(statistics=prefix)")
    ),
    *(SMALL.but(key_mask="right", dtype=d) for d in DTYPES[1:]),
)

test_mask_changes_no_statistic = judged(
    "mask and windows restrict attention; the statistics are over all real keys.",
    SMALL.but(mask="random"),
    SMALL.but(mask="empty"),
    SMALL.but(spec="bn+sparse(2,2)"),
    SMALL.but(spec="bn(statistics=prefix)+sparse(2,2)"),
    SMALL.but(spec=PREFIX, mask="random"),
    SMALL.but(spec="linear+bn", mask="random"),
    SMALL.but(spec="bn(allow_leak=true)+causal"),
)

test_statistics_are_those_of_the_keys = judged(
    "Queries are normalized by the statistics of the keys, not of the queries.",
    SMALL.but(rows=3, keys=50),
    SMALL.but(rows=1, keys=12),
    SMALL.but(rows=50, keys=4, spec="linear+bn"),
    SMALL.but(heads=6, key_heads=2, spec="bn(statistics=batch)"),
)

test_statistics_are_per_sequence = judged(
    "statistics=sequence never mixes sequences or heads; statistics=batch mixes sequences.",
    SMALL.but(lead=(3,)),
    SMALL.but(lead=(2, 3)),
    SMALL.but(lead=(3,), spec="bn(statistics=batch)"),
    SMALL.but(lead=(2, 3), spec="bn(statistics=batch)"),
    SMALL.but(lead=(), spec="bn(statistics=batch)"),
)

test_beta_weights_the_mean = judged(
    "beta multiplies the mean alone; as a parameter it may be (Hkv,) or (Hkv, D).",
    SMALL.but(spec="bn(beta=0)"),
    SMALL.but(spec="bn(beta=-1.5)"),
    SMALL.but(spec="bn(beta=2)", draw="far"),
    SMALL.but(spec="bn(beta=param)", heads=4),
    SMALL.but(spec="linear+bn(beta=0.5)"),
    SMALL.but(spec="causal+bn(statistics=prefix,beta=0.5)"),
    SMALL.but(spec="causal+bn(statistics=prefix,beta=param)"),
)

test_prefix_statistics_are_of_the_row = judged(
    "The query at p, and every key that it sees, use the statistics of the keys up to p.",
    SMALL.but(spec=PREFIX, rows=11),
    SMALL.but(spec="bn(statistics=prefix)", rows=11),
    SMALL.but(spec=PREFIX, offset=4),
    SMALL.but(spec=PREFIX, offset=-3),
    SMALL.but(spec=PREFIX, offset="end"),
    SMALL.but(spec=PREFIX, offset="sequence"),
    SMALL.but(spec=PREFIX, offset="end", key_mask="right"),
    SMALL.but(spec=PREFIX, key_mask="holes"),
    SMALL.but(spec=PREFIX, key_mask="left"),
    SMALL.but(spec=PREFIX, rows=1, offset="end"),
    SMALL.but(spec="bn(statistics=prefix)+sh(2,3)", rows=11),
    SMALL.but(spec=f"{PREFIX}+sh(1,3)", rows=11),
    SMALL.but(spec=PREFIX, rows=150, keys=150),
)
