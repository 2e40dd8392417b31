"""The arguments that models pass to an attention: which are refused, the mask, and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pdcore import UnsupportedError

__all__ = ["cast_under_autocast", "check_mask", "refuse_arguments"]

#: Arguments that models pass to every attention, and that have no effect in it.
_IGNORED = frozenset(
    {
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)

#: Advice for some of the arguments that are refused.
_ADVICE = {
    "cache": "pages of keys belong to continuous batching; use generate() with a DynamicCache",
    "cu_seq_lens_k": "pass position_ids that begin anew in each packed sequence",
    "cu_seq_lens_q": "pass position_ids that begin anew in each packed sequence",
    "sinks": "use 'eager' for a model with attention sinks",
}


def refuse_arguments(where: str, others: Mapping[str, Any]) -> None:
    """Raise for arguments that would have an effect."""
    for name, value in others.items():
        if value is None or value is False or name in _IGNORED:
            continue
        advice = _ADVICE.get(name, "use 'eager' for this model")
        raise UnsupportedError(
            f"{where}: {name}: got a {type(value).__name__}, expected None, "
            f"since it is not honoured; {advice}"
        )


def check_mask(where: str, mask: Any, expected: tuple[int, ...]) -> None:
    """Check the type and shape of a mask."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(
            f"{where}: attention_mask: got {type(mask).__name__}, expected a tensor "
            f"that broadcasts to {expected}, or None"
        )
    fits = mask.ndim == 4 and all(
        have in (1, want) for have, want in zip(mask.shape[:2], expected[:2], strict=True)
    )
    if not fits or tuple(mask.shape[2:]) != expected[2:]:
        raise ValueError(
            f"{where}: attention_mask: got shape {tuple(mask.shape)}, expected one "
            f"that broadcasts to {expected}"
        )


def cast_under_autocast(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Cast q, k and v to one dtype under autocast, as PyTorch's attention does."""
    if query.dtype == key.dtype == value.dtype:
        return query, key, value
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value  # `pdcore.attention` raises the error
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)
