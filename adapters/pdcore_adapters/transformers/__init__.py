"""pdcore attention in the models of Hugging Face transformers, version 5.

>>> from pdcore_adapters.transformers import register
>>> register("pdcore", "softmax")
>>> model.set_attn_implementation("pdcore")  # doctest: +SKIP

transformers builds the mask of a forward pass once, from padding, cache and the pattern of the
layers, and passes it to the attention of every layer. Statistics have to tell padding from
causality, and a boolean mask (B, 1, N, M) does not. So the mask function registered here returns
a `LayerMask`, which has padding and pattern as its parts, and becomes the boolean mask in any
other computation.

Notation: B sequences, Hq query heads, Hkv key heads, N queries, M keys, cached ones included.
"""

from __future__ import annotations

from ..requirements import requires

with requires("transformers"):
    from .attention import register
    from .cache import DecoderCache
    from .check import Check, check
    from .loading import wrap_methods
    from .masks import LayerMask

    wrap_methods()

__all__ = ["Check", "DecoderCache", "LayerMask", "check", "register"]
