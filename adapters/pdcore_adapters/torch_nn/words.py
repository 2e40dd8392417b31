"""The answers of `PDMultiheadAttention` to arguments that it does not take, and to a tracer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from pdcore.extend import wrong_arguments

__all__ = ["APPENDED_KEY", "as_leaf", "wrong_call", "wrong_layer"]

APPENDED_KEY = (
    "the key that it appends is no element of the sequence, with no position and no place in its "
    "statistics; use nn.MultiheadAttention for it"
)

#: What to do in place of arguments of `pdcore.attention` and of other libraries, in a call.
_OF_THE_LAYER = {
    "q": "use query=; spec is said once, by PDMultiheadAttention(spec=...)",
    "k": "use key=; spec is said once, by PDMultiheadAttention(spec=...)",
    "v": "use value=; spec is said once, by PDMultiheadAttention(spec=...)",
    "mask": "use attn_mask=, as in nn.MultiheadAttention: bool, True where a query may not attend",
    "key_mask": "use key_padding_mask=, as in nn.MultiheadAttention: bool, True for padding",
    "bias": "use a floating-point attn_mask=, which is added to the scores",
    **dict.fromkeys(("layout", "qkv_format"), "use batch_first= of PDMultiheadAttention"),
    **dict.fromkeys(
        ("spec", "backend", "dropout", "dropout_p"), "it is an argument of PDMultiheadAttention"
    ),
}

#: What to do in place of arguments of a call, in the constructor.
_OF_A_CALL = dict.fromkeys(
    ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "mask", "key_mask"),
    "it belongs to the call of the layer; spec says what the heads compute",
) | {"dropout_p": "use dropout=", "layout": "use batch_first="}


def wrong_call(function: Callable[..., Any], unknown: Mapping[str, Any]) -> TypeError:
    """Build the error for arguments that a call of the layer does not take."""
    return wrong_arguments(function, (), unknown, _OF_THE_LAYER, spec_of="PDMultiheadAttention")


def wrong_layer(function: Callable[..., Any], unknown: Mapping[str, Any]) -> TypeError:
    """Build the error for arguments that the constructor does not take."""
    return wrong_arguments(function, (), unknown, _OF_A_CALL)


def as_leaf(layer: nn.Module, query: fx.Proxy, *arguments: Any, **keywords: Any) -> Any:
    """Record a layer in a graph of `torch.fx` as one call, as it records layers of PyTorch.

    Raises
    ------
    torch.fx.proxy.TraceError
        When the layer itself is what is traced.
    """
    tracer = query.tracer
    if tracer.root is layer:
        raise fx.proxy.TraceError(
            f"{type(layer).__name__} is a leaf of torch.fx; trace the model that contains it"
        )
    name = tracer.path_of_module(layer)
    return tracer.create_proxy("call_module", name, (query, *arguments), keywords)
