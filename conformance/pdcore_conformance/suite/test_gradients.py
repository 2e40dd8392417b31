"""Exact gradients, through statistics, pooling, lse, bias and parameters.

Each test exists twice: by `attention_vjp`, and by the framework's automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..judge.calls import Call
from ..judge.judging import full, judged

SMALL = Call()


def both(rule: str, *calls: Any) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the tests of a rule by `attention_vjp` and by automatic differentiation."""
    return judged(rule, *calls, through="vjp"), judged(rule, *calls, through="autodiff")


test_gradient_of_each_kernel, test_autodiff_of_each_kernel = both(
    "d/dq, d/dk and d/dv of out and lse, kernel by kernel.",
    *(
        SMALL.but(spec=text, dtype=d)
        for d in ("float32", "float64")
        for text in (
            "softmax",
            "softmax(softcap=2)",
            "gaussian(gamma=0.3)",
            "cosine",
            "polynomial",
            "linear",
            "relu",
            "random_features(count=16)",
            "conformance_logistic",
            "conformance_square",
            "conformance_dot+h(one)",
        )
    ),
    *(
        SMALL.but(spec=text, dtype=d)
        for d in ("float16", "bfloat16")
        for text in ("softmax", "linear", "gaussian(gamma=0.3)")
    ),
)

test_statistics_are_differentiated, test_autodiff_of_statistics = both(
    "The mean and the variance depend on the keys, and d/dk includes that.",
    *(
        SMALL.but(spec=text, dtype=d)
        for d in ("float32", "float64")
        for text in (
            "bn",
            "bn(beta=0.5)",
            "bn(statistics=batch)",
            "linear+bn",
            "gaussian(gamma=0.3)+bn",
            "conformance_centred",
            "causal+bn(statistics=prefix)",
            "bn(statistics=prefix)",
            "iebn",
            "linear+iebn(beta=0.5)",
            "iebn(beta=param)",
        )
    ),
    *(
        SMALL.but(spec=text, dtype=d, keys=40)
        for d in ("float32", "float64")
        for text in ("mixture", "linear+mixture(3,steps=1,beta=0.5)", "mixture(components=1)")
    ),
    SMALL.but(spec="mixture(eps=0.1)", key_mask="holes"),
    SMALL.but(spec="mixture(eps=0.1)+sh(1,2)", heads=4, keys=40),
    SMALL.but(spec="bn", dtype="bfloat16"),
    SMALL.but(spec="bn", keys=3, key_mask="one"),
    SMALL.but(spec="bn", key_mask="holes"),
    SMALL.but(spec="causal+bn(statistics=prefix)", key_mask="left", rows=11),
)

test_convolution_is_differentiated, test_autodiff_of_convolution = both(
    "A key's gradient comes from its neighbours too, and the filter has one.",
    *(
        SMALL.but(spec=text, dtype=d, keys=12)
        for d in ("float32", "float64")
        for text in ("conv1d(size=4)", "conv2d(3,4)")
    ),
    SMALL.but(spec="linear+conv1d+sh(1,2)", heads=4, key_mask="holes"),
    SMALL.but(spec="conv1d(padding=causal)+causal", rows=11, key_mask="left"),
)

test_pooling_is_differentiated, test_autodiff_of_pooling = both(
    "d/dk and d/dv of a pooled key are distributed over the keys that it covers.",
    *(
        SMALL.but(spec=text, key_mask=how)
        for how in ("", "holes")
        for text in ("sh(2,3)", "sh(2,3,pool=first)", "bn+sh(1,4)", "linear+sh(2,3)")
    ),
    SMALL.but(spec="causal+sh(2,3)", rows=11),
)

test_lse_is_differentiated, test_autodiff_of_lse = both(
    "lse has a gradient, that of log h.",
    *(
        SMALL.but(spec=text, dtype="float64")
        for text in (
            "softmax",
            "bn",
            "linear",
            "softmax+h(count)",
            "softmax+h(one)",
            "gaussian(gamma=0.3)+bn",
        )
    ),
)

test_padding_has_zero_gradient, test_autodiff_of_padding = both(
    "Padding may hold NaN: its gradient is 0, and no other gradient is NaN.",
    *(
        SMALL.but(spec=text, key_mask=how)
        for how in ("right", "holes", "none")
        for text in ("softmax", "bn", "linear", "gaussian(gamma=0.3)", "sh(2,3)", "cosine")
    ),
)

test_values_without_columns, test_autodiff_of_values_without_columns = both(
    "Values without columns have a log-sum-exp, whose gradients are those of queries and keys.",
    *(SMALL.but(spec=text, value_dim=0) for text in ("softmax", "linear")),
)

test_empty_row_has_zero_gradient, test_autodiff_of_empty_rows = both(
    "A row that sees no key has gradient 0, never NaN.",
    *(
        SMALL.but(spec=text, mask="empty")
        for text in ("softmax", "bn", "linear", "polynomial", "softmax+h(count)")
    ),
    *(
        SMALL.but(spec=text, offset=-4, rows=11)
        for text in ("causal", "causal+linear", "causal+bn(statistics=prefix)")
    ),
    SMALL.but(keys=0),
    SMALL.but(rows=0, spec="bn"),
    SMALL.but(bias="inf"),
)

test_singular_points_have_zero_gradient, test_autodiff_at_singular_points = both(
    "Polynomial at base 0, relu at 0, cosine at a zero vector: 0, never NaN.",
    *(
        SMALL.but(spec=text, draw="zeros")
        for text in ("cosine", "polynomial(degree=2,coef0=0)", "relu", "softmax")
    ),
)

test_heads_of_a_group_add_up, test_autodiff_of_groups = both(
    "d/dk and d/dv sum over the query heads that share a key head.",
    *(
        SMALL.but(spec=text, heads=hq, key_heads=hkv)
        for hq, hkv in ((4, 2), (6, 2), (3, 1))
        for text in ("softmax", "bn", "linear")
    ),
    SMALL.but(spec="bn+sh(1,2)", heads=6),
)

test_bias_is_differentiated, test_autodiff_of_bias = both(
    "d/dbias has the shape of the bias: summed over what was broadcast.",
    *(
        SMALL.but(bias=how, dtype=d)
        for how in ("full", "keys", "rows", "inf")
        for d in ("float32", "float64")
    ),
    SMALL.but(bias="full", spec="bn", heads=4),
    SMALL.but(bias="float32", dtype="bfloat16"),
)

test_parameters_are_differentiated, test_autodiff_of_parameters = both(
    "Gradients flow to params; running statistics are constants.",
    *(
        SMALL.but(spec=text, heads=4)
        for text in (
            "bn(beta=param)",
            "bn(statistics=running,beta=param)",
            "conformance_logistic",
            "conformance_square",
            "conformance_centred",
            "iebn",
            "causal+bn(statistics=prefix,beta=param)",
            "bn(beta=param,with_std=false)",
            "bn(beta=param,statistics=running,with_std=false)",
            "causal+bn(beta=param,statistics=prefix,with_std=false)",
            "gaussian(gamma=0.3)+bn(beta=param,with_std=false)",
            "softmax(softcap=2)+causal+bn(beta=param,eps=0.1,statistics=prefix)",
        )
    ),
    SMALL.but(spec="bn(statistics=running)"),
    *(
        SMALL.but(spec="bn(with_std=false)", draw=how, dtype=dtype)
        for dtype, how in (("float32", "far"), ("bfloat16", "away"))
    ),
)

test_gradient_of_supports, test_autodiff_of_supports = both(
    "Causal, windows, offsets and masks, over several blocks.",
    *(
        SMALL.but(spec=text, rows=11)
        for text in ("causal", "causal+linear", "sparse(2,1)", "sparse(2,1)+linear")
    ),
    *(
        SMALL.but(spec=text, offset=offset)
        for offset in (3, "sequence", "end")
        for text in ("causal", "causal+linear")
    ),
    *(SMALL.but(spec=text, mask="random") for text in ("softmax", "linear", "bn")),
    *(
        Call(spec=text, lead=(1,), rows=130, keys=260, dim=16)
        for text in (
            "softmax",
            "causal",
            "causal+linear",
            "bn",
            "sparse(20,3)",
            "softmax(softcap=2)",
            "polynomial",
        )
    ),
    full(Call(spec="causal", lead=(1,), rows=2000, keys=2000, heads=1, key_heads=1)),
)

test_gradient_at_loud_and_far_inputs, test_autodiff_at_loud_and_far_inputs = both(
    "Large logits, keys far from 0, constant features.",
    *(
        SMALL.but(spec=text, draw=how)
        for text, how in (
            ("softmax", "loud"),
            ("bn", "far"),
            ("bn", "constant"),
            ("gaussian(gamma=0.3)", "far"),
            ("linear+bn", "far"),
        )
    ),
)
