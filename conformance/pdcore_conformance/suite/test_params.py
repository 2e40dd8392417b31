"""Parameters: arrays that a spec names and the call passes."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, judged

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
