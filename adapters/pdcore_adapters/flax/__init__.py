"""pdcore attention in the attention layers of Flax, NNX and Linen.

>>> from flax import nnx
>>> attend = attention_fn("bn+sh(1,1,2,2)")
>>> layer = nnx.MultiHeadAttention(4, 16, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
>>> layer(jax.numpy.ones((2, 10, 16))).shape
(2, 10, 16)

Flax passes one mask to its attention. Padding, a causal pattern and unwritten entries of a cache
are all part of it, and statistics have to tell them apart. This module interprets a mask by its
shape, and refuses a mask whose shape is ambiguous; `attention_fn` lists the rules.

Notation: *B leading axes, H query heads, Hkv key heads, N queries, M keys.
"""

from __future__ import annotations

from ..requirements import requires

with requires("flax"):
    import jax  # noqa: F401 - the example above uses it

    from .attention import PackedMask, attention_fn
    from .decoding import DecoderAttention
    from .modules import LinenSpecAttention, SpecAttention

__all__ = ["DecoderAttention", "LinenSpecAttention", "PackedMask", "SpecAttention", "attention_fn"]
