"""Packed sequences: the rows of a segment are those of a call on the segment alone."""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import judged

SMALL = Call(rows=14, keys=14, segments="ragged")
PADDED = SMALL.but(segments="padded")
PAIR = SMALL.but(keys=17, segments="pair")

test_segments_do_not_see_each_other = judged(
    "A query sees the keys of its own segment only, in every kind of kernel.",
    *(
        SMALL.but(spec=text)
        for text in ("softmax", "linear", "gaussian(gamma=0.3)", "softmax+h(count)", "cosine")
    ),
    SMALL.but(dtype="float64"),
    SMALL.but(dtype="bfloat16"),
    SMALL.but(spec="causal", heads=4, lead=(1, 2)),
    SMALL.but(mask="random", bias="rows"),
)

test_positions_start_anew = judged(
    "Positions, windows, offsets and the windows of pooling begin with the segment.",
    *(
        SMALL.but(spec=text)
        for text in ("causal+linear", "causal+sparse(2,inf)", "sh(2,3)", "causal+sh(1,2)")
    ),
    *(PAIR.but(spec="causal", offset=offset) for offset in (2, "array", "end")),
    SMALL.but(spec="causal", key_mask="right", offset="end"),
)

test_statistics_start_anew = judged(
    "Mean, variance, prefixes, mixtures and taps are those of the segment's own keys.",
    *(
        SMALL.but(spec=text)
        for text in ("bn", "causal+bn(statistics=prefix)", "bn+sh(2,3)", "iebn", "conv1d")
    ),
    SMALL.but(spec="bn", draw="far"),
    SMALL.but(spec="mixture(eps=0.1)", segments="equal"),
    SMALL.but(spec="bn", key_mask="holes"),
    SMALL.but(spec="bn(statistics=running)"),
)

test_batch_statistics_are_over_all_segments = judged(
    "Statistics of the batch take the keys of every segment, also of one without queries, once.",
    SMALL.but(spec="bn(statistics=batch)"),
    SMALL.but(spec="bn(statistics=batch)+sh(2,3)", key_mask="holes"),
    PAIR.but(spec="bn(statistics=batch)"),
)

test_padding_between_segments_is_ignored = judged(
    "Padding may hold NaN; its queries give zeros and an lse of -inf, as those without keys do.",
    *(PADDED.but(spec=text) for text in ("softmax", "bn", "linear", "sh(2,3)+bn")),
    *(PAIR.but(spec=text) for text in ("softmax", "bn")),
)

GRADIENTS = (
    PADDED.but(spec="bn"),
    SMALL.but(spec="causal+linear"),
    PADDED.but(spec="sh(2,3)+bn"),
    PAIR.but(spec="bn(statistics=batch)"),
    SMALL.but(spec="bn(beta=param)", bias="keys"),
)
test_gradient_of_segments = judged(
    "Gradients are those of the calls on each segment, and 0 in padding.", *GRADIENTS, through="vjp"
)
test_autodiff_of_segments = judged(
    "The framework's gradients are those of the calls on each segment.",
    *GRADIENTS,
    through="autodiff",
)

test_weights_of_segments = judged(
    "Weights of keys of other segments are 0.",
    PADDED.but(spec="bn"),
    PAIR.but(spec="sh(2,3)"),
    through="weights",
)
