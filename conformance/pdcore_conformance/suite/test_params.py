"""Parameters: arrays that a spec names and the call passes."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, judged
from .test_gradients import both

SMALL = Call()

test_parameters_reach_their_heads = judged(
    "A parameter has one entry for each key head, also where query heads share key heads.",
    *(
        SMALL.but(spec=text, heads=hq, key_heads=hkv)
        for text in (
            "bn(beta=param)",
            "bn(statistics=running)",
            "conformance_logistic",
            "conformance_square",
            "conformance_centred",
            "iebn",
        )
        for hq, hkv in ((2, 2), (6, 3))
    ),
    *(SMALL.but(spec="bn(statistics=running)", dtype=d) for d in DTYPES[1:]),
    SMALL.but(spec="bn(statistics=running)+sh(2,1)"),
    SMALL.but(spec="conformance_logistic+sh(1,2)"),
)

test_parameters_left_out_have_their_default = judged(
    "A parameter with a default may be left out.",
    *(
        SMALL.but(spec=text, given=False)
        for text in ("conformance_logistic", "conformance_square", "conformance_centred")
    ),
)

SHARED = SMALL.but(spec="conformance_tempered", heads=4)

test_query_heads_of_one_key_head_have_scalars_of_their_own = judged(
    "A parameter of log kappa by query head is not that of the key head.",
    SHARED,
    SHARED.but(spec="conformance_tempered+causal+bn(statistics=prefix)"),
)

test_gradient_of_scalars_of_query_heads, test_autodiff_of_scalars_of_query_heads = both(
    "Each query head has the gradient of its own scalar.",
    SHARED,
    SHARED.but(dtype="float64", key_mask="right"),
)
