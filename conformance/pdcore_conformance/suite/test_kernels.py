"""Kernels kappa(x, y) and the normaliser h."""

from __future__ import annotations

from ..judge.budget import judge
from ..judge.calls import Call, drawn
from ..judge.judging import DTYPES, each, full, judged
from ..judge.overflow import expect_nearby, overflow_excused
from ..judge.subject import Subject

SMALL = Call()
KERNELS = (
    "softmax",
    "softmax(scale=0.5)",
    "softmax(softcap=2)",
    "gaussian(gamma=0.3)",
    "cosine",
    "cosine(scale=4)",
    "polynomial",
    "polynomial(degree=4,coef0=0.5,scale=0.3)",
    "linear",
    "relu",
    "random_features(count=16)",
    "random_features(count=32,seed=7,scale=0.2)",
    "conformance_logistic",
    "conformance_square",
    "conformance_dot+h(one)",
)

test_kernel_is_computed = judged(
    "Each kernel, alone, in every dtype.",
    *(SMALL.but(spec=text, dtype=dtype) for dtype in DTYPES for text in KERNELS),
)

test_softcap_is_applied = judged(
    "Logits of several times the cap, where the softcap changes the weights much.",
    *(SMALL.but(spec="softmax(softcap=3)", draw="loud", dtype=d) for d in DTYPES),
)

test_scale_is_applied = judged(
    "Scales other than 1/sqrt(D), and the default where D is no square number.",
    SMALL.but(spec="softmax(scale=1)", dim=7),
    SMALL.but(spec="softmax", dim=7),
    SMALL.but(spec="softmax(scale=0.01)", draw="loud"),
    SMALL.but(spec="linear", dim=7),
    SMALL.but(spec="cosine(scale=10)", dim=7),
)

test_exponentials_do_not_overflow = judged(
    "Logits in the hundreds: the row's maximum has to be subtracted.",
    *(
        SMALL.but(spec=text, draw="loud", dtype=dtype)
        for dtype in DTYPES
        for text in ("softmax", "gaussian(gamma=1)", "random_features(count=16)")
    ),
    # Its log kappa is far above the product of the norms.
    SMALL.but(spec="polynomial(degree=120)"),
    SMALL.but(spec="polynomial(degree=120)", dtype="float64"),
)

test_exponentials_do_not_underflow = judged(
    "Logits in the hundreds below 0: the row's maximum has to be subtracted, whatever its sign.",
    *(
        SMALL.but(spec=text, draw="opposed", dtype=dtype)
        for dtype in DTYPES
        for text in ("softmax", "causal")
    ),
)

#: Calls whose statistics, norms or features overflow. Those whose scores do are left out: a fused
#: kernel takes a product of -inf for a key that is hidden.
OVERFLOWING = [
    *(
        SMALL.but(spec=text, draw=how)
        for how in ("vast", "vast_keys", "largest")
        for text in (
            "softmax(softcap=2)",
            "gaussian(gamma=0.3)",
            "cosine",
            "polynomial",
            "linear",
            "relu+causal",
            "random_features(count=16)",
            "bn",
            "bn+sh(1,2)",
            "bn(statistics=batch)",
            "causal+bn(statistics=prefix)",
            "iebn+sh(1,2)",
            "mixture",
            "linear+mixture+sh(1,2)",
            "gaussian(gamma=0.3)+bn",
            "conv1d",
        )
    ),
    *(
        SMALL.but(spec=text, draw="largest", dtype=dtype, **how)
        for dtype in DTYPES
        for text, how in (
            ("bn", {"keys": 5, "key_mask": "right"}),
            ("gaussian(gamma=0.3)", {"keys": 5}),
        )
    ),
]


@each(OVERFLOWING)
def test_overflow_is_visible(call: Call, subject: Subject) -> None:
    """A row whose statistics overflow is right or NaN: never zeros, never uniform."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    expected = expect_nearby(call)
    for lse in (True, False):
        got = subject.compute(drawn(call), call.spec, lse=lse)
        subject.evidence.add(judge(overflow_excused(got, expected), expected))


test_running_maximum_is_carried = judged(
    "The largest logit is in the last blocks of keys, so that earlier sums must be rescaled.",
    *(
        SMALL.but(spec=text, draw="growing", rows=33, keys=1031, dtype=dtype)
        for dtype in ("float32", "float16")
        for text in ("softmax(scale=2)", "gaussian(gamma=0.1)", "polynomial(degree=4)")
    ),
)

test_cosine_of_a_zero_vector_is_zero = judged(
    "Rows of zeros in queries and keys have cosine 0, never NaN.",
    *(SMALL.but(spec="cosine(scale=2)", draw="zeros", dtype=d) for d in DTYPES),
)

test_polynomial_is_even = judged(
    "Negative bases to an even power are positive, and a base of 0 has weight 0.",
    SMALL.but(spec="polynomial(degree=2,coef0=0,scale=1)"),
    SMALL.but(spec="polynomial(degree=2,coef0=0,scale=1)", draw="zeros"),
    SMALL.but(spec="polynomial(degree=6,coef0=0.25)", dtype="float64"),
)

test_relu_features_may_all_be_zero = judged(
    "Rows whose kernel values are all 0 give zeros and an lse of -inf.",
    SMALL.but(spec="relu", draw="zeros"),
    SMALL.but(spec="relu+h(count)", draw="zeros"),
    SMALL.but(spec="relu", dim=1),
)

SMALL_FEATURES = (
    *(SMALL.but(spec="linear", draw="negative", dtype=d) for d in DTYPES),
    *(SMALL.but(spec="relu", draw="tiny", dtype=d) for d in ("float32", "bfloat16")),
    *(
        SMALL.but(spec=text, draw="negative", **how)
        for text in ("linear+causal", "linear+sparse(3,2)", "linear+sh(2,3)")
        for how in ({}, {"key_mask": "holes"}, {"heads": 4})
    ),
    SMALL.but(spec="linear", draw="negative", mask="random"),
    SMALL.but(spec="relu+causal", draw="tiny", rows=1, offset="end"),
    SMALL.but(spec="linear+h(count)", draw="negative", dtype="float64"),
    SMALL.but(spec="linear+causal", draw="rising", rows=200, keys=200),
)

test_small_features_do_not_vanish = judged(
    "Products of features far below 1 do not underflow: the largest feature is divided out.",
    *SMALL_FEATURES,
)

test_small_features_have_gradients = judged(
    "The pullback of features far below 1 neither underflows nor overflows.",
    *SMALL_FEATURES,
    through="vjp",
)

test_small_features_are_differentiated = judged(
    "So does the framework's own derivative.",
    *SMALL_FEATURES[:6],
    *SMALL_FEATURES[-1:],
    through="autodiff",
)

test_omega_is_the_specified_draw = judged(
    "Random features are those of numpy.random.RandomState(seed).standard_normal((count, D)).",
    SMALL.but(spec="random_features(count=5,seed=3)", dtype="float64"),
    SMALL.but(spec="random_features(count=128,seed=11)", dim=3),
)

test_normaliser_counts_visible_keys = judged(
    "h(count) divides by the number of keys that a row sees, h(one) by nothing.",
    *(
        SMALL.but(spec=f"{text}+h({h})", **how)
        for text in ("softmax", "gaussian(gamma=0.3)", "linear", "conformance_logistic")
        for h in ("count", "one")
        for how in (
            {},
            {"mask": "random"},
            {"key_mask": "right"},
            {"key_mask": "holes", "mask": "empty"},
        )
    ),
    SMALL.but(spec="softmax+h(count)+causal"),
    SMALL.but(spec="softmax+h(count)+sh(2,3)+causal", keys=11),
    full(SMALL.but(spec="linear+h(one)+causal", rows=300, keys=300)),
)
