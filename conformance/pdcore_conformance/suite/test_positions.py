"""Terms of log kappa that are functions of positions."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import DTYPES, full, judged, specs
from .test_gradients import both

SMALL = Call(spec="alibi", rows=11)

#: Kernels, normalizations, normalisers and supports, each with a term of positions.
SPECS = (
    "softmax(softcap=2)+alibi",
    "gaussian(gamma=0.3)+alibi",
    "polynomial+alibi",
    "conformance_logistic+alibi",
    "alibi+bn",
    "causal+alibi+bn(statistics=prefix)",
    "causal+alibi",
    "alibi+h(sum,sink=param)",
    "sparse(2,1)+alibi+h(count)",
)

#: Positions that are not the indices of rows, and keys that are hidden.
PLACES = (
    SMALL.but(offset=-7),
    SMALL.but(offset="sequence"),
    SMALL.but(offset="end", rows=4, key_mask="right"),
    SMALL.but(spec="causal+alibi", offset="array"),
    SMALL.but(mask="random", bias="keys"),
)

test_alibi_is_linear_in_the_distance = judged(
    "alibi adds -m |p_j - p_i| to log kappa, with a slope m for each query head.",
    *(SMALL.but(dtype=d, heads=6) for d in DTYPES),
    *specs(SMALL, *SPECS),
    *PLACES,
    Call(spec="causal+alibi", lead=(1,), heads=4, rows=300, keys=700, offset=400, dim=16),
    full(Call(spec="alibi", lead=(1,), rows=2000, keys=2000, dim=16)),
)

test_slopes_have_a_default = judged(
    "Without params the slopes are 2^(-8 h / n) of n = 2^floor(log2 Hq), and between them.",
    *(SMALL.but(heads=hq, key_heads=1, given=False) for hq in (1, 2, 3, 8, 12)),
)

test_slopes_are_differentiated, test_autodiff_of_slopes = both(
    "The gradient of a slope is a sum over all pairs of its head.",
    SMALL.but(dtype="float64", heads=6),
    SMALL.but(dtype="bfloat16"),
    *specs(SMALL, *SPECS[::2]),
    *PLACES[1:3],
    Call(spec="causal+alibi", lead=(1,), heads=4, rows=130, keys=560, offset=430, dim=16),
)

test_weights_go_by_positions = judged(
    "The weights contain the terms of positions.",
    SMALL.but(heads=4),
    SMALL.but(spec="causal+alibi", offset=2),
    through="weights",
)
