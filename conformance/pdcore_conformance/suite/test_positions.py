"""Terms of log kappa, and kernels of users, that are functions of positions and labels."""

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

#: Specs with tables: by distance and by labels, of the grammar and of a kernel of users.
TABLES = ("relative(3)", "labels(3)", "conformance_placed")

#: The same with the other axes.
WITH_TABLES = (
    "causal+relative(2)",
    "relative(0)+softmax(softcap=2)",
    "gaussian(gamma=0.3)+labels(4)",
    "polynomial+relative(40)",
    "alibi+relative(3)+labels(3)",
    "labels(3)+bn",
    "causal+relative(3)+bn(eps=0.1,statistics=prefix)",
    "labels(3)+h(sum,sink=param)",
    "sparse(2,1)+relative(2)+h(count)",
    "conformance_placed+causal",
)
LONG = Call(spec="causal+relative(40)+labels(3)", lead=(1,), heads=4, rows=300, keys=700, dim=16)

test_tables_are_read_by_distance_and_label = judged(
    "An entry of a table is that of p_j - p_i up to both ends, or of the labels of the pair.",
    *specs(SMALL.but(heads=4), *TABLES),
    *(SMALL.but(spec="relative(3)+labels(3)", dtype=d) for d in DTYPES),
    *specs(SMALL, *WITH_TABLES[::2]),
    *(full(call) for call in specs(SMALL, *WITH_TABLES[1::2])),
    *(case.but(spec="conformance_placed") for case in PLACES[:3]),
    SMALL.but(spec="labels(3)", key_mask="holes"),
    full(SMALL.but(spec="labels(3)+relative(2)", lead=(), rows=1)),
    SMALL.but(spec="relative(3)", given=False),
    SMALL.but(spec="labels(3)+relative(1)+causal", rows=14, keys=14, segments="padded"),
    LONG.but(offset=400),
)

test_gradient_of_tables, test_autodiff_of_tables = both(
    "The gradient of an entry is a sum over the pairs that read it.",
    *specs(SMALL.but(dtype="float64", heads=4), *TABLES),
    SMALL.but(spec="relative(3)+labels(3)", dtype="bfloat16"),
    *(full(call) for call in specs(SMALL, *WITH_TABLES)),
    PLACES[1].but(spec="conformance_placed"),
    LONG.but(rows=130, keys=560, offset=430),
)

test_gradient_of_tables_of_segments = judged(
    "The gradient of an entry is a sum over the pairs of all segments.",
    SMALL.but(spec="labels(3)+relative(1)", rows=14, keys=14, segments="padded"),
    through="vjp",
)

test_entries_of_minus_infinity_remove_keys = judged(
    "An entry of -inf removes the keys that read it, from h(count) too, and has gradient 0.",
    *specs(SMALL.but(draw="removed"), "labels(3)", "relative(2)+h(count)", "labels(3)+h(one)"),
)

test_gradient_without_removed_keys = judged(
    "The gradient of an entry of -inf is 0, and others are as without its keys.",
    *specs(SMALL.but(draw="removed"), "labels(3)+relative(2)", "labels(3)+h(count)"),
    through="vjp",
)

test_weights_go_by_tables = judged(
    "The weights contain the entries of tables.",
    *specs(SMALL.but(heads=4), *TABLES[1:]),
    through="weights",
)
