"""Gradients over several blocks of rows and keys, where a pullback adds up parts of each.

Each test exists twice: by `attention_vjp`, and by the framework's automatic differentiation.
"""

from __future__ import annotations

from ..judge.calls import Call
from ..judge.judging import judged
from .test_gradients import both

BLOCKS = Call(lead=(1,), rows=130, keys=260, dim=16, value_dim=16)
SQUARE = BLOCKS.but(rows=260)
PREFIX = "causal+bn(statistics=prefix)"

test_groups_add_up_over_blocks, test_autodiff_of_groups_over_blocks = both(
    "Query heads that share a key head add to its gradient, block by block.",
    *(
        BLOCKS.but(spec=text, heads=hq, key_heads=hkv)
        for text in ("softmax", "bn", "linear", "causal", "causal+linear")
        for hq, hkv in ((4, 2), (8, 1))
    ),
    BLOCKS.but(heads=32, key_heads=8, rows=33, keys=70),
)

test_pools_over_blocks, test_autodiff_of_pools_over_blocks = both(
    "Scaled heads: the gradient of a pooled key goes to all its keys, over several blocks.",
    *(
        BLOCKS.but(spec=text, heads=4, key_mask=how)
        for text in ("sh(1,2)", "bn+sh(1,4)", "sh(2,3,pool=first)", "causal+sh(2,3)")
        for how in ("", "holes")
    ),
    BLOCKS.but(spec="bn+sh(1,1,2,2)", heads=8, key_heads=4),
)

test_sixteen_bits_over_blocks, test_autodiff_of_sixteen_bits_over_blocks = both(
    "16-bit gradients are sums in float32, over several blocks.",
    *(
        call.but(spec=text, dtype=d)
        for d in ("float16", "bfloat16")
        for call in (BLOCKS, BLOCKS.but(heads=8, rows=33, dim=64, value_dim=64))
        for text in ("softmax", "bn", "causal", "linear", "sh(1,2)")
    ),
)

test_long_sums_in_sixteen_bits, test_autodiff_of_long_sums_in_sixteen_bits = both(
    "d/dk and d/dv of thousands of rows, which no sum in 16 bits holds.",
    *(
        Call(spec=text, lead=(1,), rows=4000, keys=9, dim=4, value_dim=4, dtype=d, draw="positive")
        for d in ("float16", "bfloat16")
        for text in ("softmax", "bn")
    ),
)

test_long_results_in_sixteen_bits = judged(
    "Results of thousands of keys, which no sum in 16 bits holds.",
    *(
        Call(spec=text, lead=(1,), rows=9, keys=4000, dim=4, value_dim=4, dtype=d, draw="positive")
        for d in ("float16", "bfloat16")
        for text in ("softmax", "bn", "linear", "causal", "sh(1,2)")
    ),
)

test_support_over_blocks, test_autodiff_of_support_over_blocks = both(
    "Causal support and windows beyond two blocks of rows and keys, with offsets.",
    *(
        SQUARE.but(spec=text, heads=hq)
        for text in ("causal", "sparse(20,7)", "sparse(150,3)", "causal+sparse(140,inf)")
        for hq in (2, 4)
    ),
    *(
        BLOCKS.but(spec=text, offset=offset)
        for text in ("causal", "sparse(70,3)", "causal+linear")
        for offset in (100, "sequence", "end")
    ),
    SQUARE.but(spec="causal", rows=385, keys=385, heads=1, key_heads=1),
    SQUARE.but(spec="random_features(8)+sparse(70,3)", rows=300, mask="sequences"),
)

test_prefixes_over_blocks, test_autodiff_of_prefixes_over_blocks = both(
    "Prefix statistics: a key has a gradient from the statistics of every later row.",
    *(
        Call(spec=text, lead=(1,), heads=1, key_heads=1, rows=n, keys=n, dim=4, value_dim=4)
        for text in (PREFIX, "bn(statistics=prefix)")
        for n in (65, 150)
    ),
    Call(spec=PREFIX, lead=(1,), heads=1, key_heads=1, rows=270, keys=270, dim=2, value_dim=2),
    Call(spec=PREFIX, lead=(1,), heads=4, rows=70, keys=70, dim=4, key_mask="left"),
)

test_masks_over_blocks, test_autodiff_of_masks_over_blocks = both(
    "Masks and padding of every shape, over several blocks.",
    *(
        BLOCKS.but(spec=text, mask=how, heads=4)
        for text in ("softmax", "bn")
        for how in ("random", "heads", "sequences", "rows", "strided", "empty")
    ),
    *(BLOCKS.but(spec=text, key_mask="holes") for text in ("softmax", "bn", "linear", "causal")),
)

test_bias_over_blocks, test_autodiff_of_bias_over_blocks = both(
    "d/dbias of every shape, over several blocks; summed over what was broadcast.",
    *(
        BLOCKS.but(bias=how, heads=4)
        for how in ("full", "keys", "rows", "heads", "batch", "sequences", "strided", "inf")
    ),
    *(
        BLOCKS.but(bias=how, lead=(3,), rows=20, keys=140, dim=8, value_dim=8)
        for how in ("keys", "rows", "heads", "batch", "sequences")
    ),
    *(BLOCKS.but(bias="full", spec=text, heads=4) for text in ("causal", "bn", "polynomial")),
)

test_wide_heads_over_blocks, test_autodiff_of_wide_heads_over_blocks = both(
    "128 features a head.",
    *(
        BLOCKS.but(spec=text, dim=128, value_dim=128, dtype=d, rows=70)
        for text in ("softmax", "bn", "causal")
        for d in ("float32", "bfloat16")
    ),
)

test_decoding_is_differentiated, test_autodiff_of_decoding = both(
    "One query over many keys.",
    *(
        BLOCKS.but(spec=text, rows=1, heads=8, offset="end")
        for text in ("causal", "linear", "bn", "causal+sparse(100,inf)")
    ),
    BLOCKS.but(rows=1, keys=2100, offset="end", spec="causal"),
)
