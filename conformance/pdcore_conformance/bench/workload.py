"""The calls that the bench times."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DIRECTIONS", "Shape", "Workload", "half_pooled"]

#: (B, H, N, D) of q, k and v.
Shape = tuple[int, int, int, int]

#: What is timed: the result alone, or the result and the gradients of q, k and v.
DIRECTIONS = ("forward", "forward+backward")


def half_pooled(heads: int) -> str:
    """Return the spec of Attention-SH with half of the heads at scale 2."""
    return f"sh({','.join('1' * (heads // 2) + '2' * (heads - heads // 2))})"


class Workload(NamedTuple):
    """A call whose time is measured.

    Attributes
    ----------
    spec : str
    shape : tuple of int
        (B, H, N, D) of q, k and v.
    dtype : str
    direction : {"forward", "forward+backward"}
    """

    spec: str
    shape: Shape
    dtype: str = "float32"
    direction: str = "forward"

    def __str__(self) -> str:
        return f"{self.spec} {self.shape} {self.dtype} {self.direction}"
