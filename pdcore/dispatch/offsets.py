"""Offsets near the ends of 64 bits, in place of which smaller ones have the same effect."""

from __future__ import annotations

from typing import Any

from ..spec import AttentionSpec

__all__ = ["LARGE", "near_offset"]

#: Offsets that a backend with 32-bit positions, such as JAX, adds rows and windows to.
LARGE = 2**30


def near_offset(spec: AttentionSpec, offset: int, q: Any, k: Any) -> int:
    """Return the offset near zero that has the effect of a large one.

    Raises
    ------
    ValueError
        For a window so wide that there is none.
    """
    low, high = spec.support.offsets(q.shape[-2], k.shape[-2], spec.heads.largest)
    near = max(low, min(offset, high))
    if not -LARGE < near < LARGE:
        raise ValueError(
            f"offset: got {offset} for {spec}, expected -2**30 < offset < 2**30 with a window "
            "so wide"
        )
    return near
