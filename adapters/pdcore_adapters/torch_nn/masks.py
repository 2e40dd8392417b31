"""The masks of ``torch.nn.MultiheadAttention``: True hides, and floating-point masks are added."""

from __future__ import annotations

import math
from typing import Any

import torch

from pdcore import UnsupportedError
from pdcore.extend import compiling

__all__ = ["check_addend", "check_hides_only", "check_mask", "require", "with_batch"]


def check_mask(mask: Any, name: str, shapes: list[tuple[int, ...]]) -> None:
    """Check the dtype and shape of a mask."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name}: got dtype {mask.dtype}, expected bool, True where it hides, or a "
            "floating-point dtype"
        )
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"{name}: got shape {tuple(mask.shape)}, expected {' or '.join(map(str, shapes))}"
        )


def check_addend(mask: Any, name: str, q: Any) -> Any:
    """Check the dtype of a float mask that is added to log kappa, and return the mask."""
    if mask.dtype not in (torch.float32, q.dtype):
        expected = " or ".join(str(dtype) for dtype in {torch.float32, q.dtype})
        raise TypeError(f"{name}: got dtype {mask.dtype}, expected bool or {expected}")
    return mask


def check_hides_only(mask: Any, name: str, reason: str) -> None:
    """Check that a float mask has the values 0 and -inf only, where `reason` rules out others."""
    require(
        ((mask == 0) | (mask == -math.inf)).all(),
        f"{name}: got a float mask with values other than 0 and -inf, and {reason}; give a bool "
        "mask, True where it hides",
    )


def with_batch(x: Any) -> Any:
    """Return the ids or labels of an unbatched call with an axis of one sequence."""
    if x is None:
        return None
    return tuple(part[None] for part in x) if isinstance(x, tuple | list) else x[None]


def require(condition: Any, message: str) -> None:
    """Raise an `UnsupportedError` unless a condition on values holds, also in compiled code."""
    if compiling():
        torch._assert_async(condition, message)  # an operation of the graph, not a branch
    elif not condition:
        raise UnsupportedError(message)
