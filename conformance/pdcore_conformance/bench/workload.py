"""The calls that the bench times."""

from __future__ import annotations

from typing import NamedTuple

from pdcore.spec import as_spec

__all__ = ["DIRECTIONS", "Shape", "Workload", "half_pooled", "operations"]

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


def operations(workload: Workload) -> float:
    """Return the number of operations in a call's matrix products.

    There are two products forward and five backward. Pairs that a causal call hides are not
    counted, and a head of scale s has one key for every s keys.
    """
    batch, heads, length, dim = workload.shape
    scales = as_spec(workload.spec).for_heads(heads).heads.scales or (1,) * heads
    visible = 0.5 if "causal" in workload.spec else 1.0
    pairs = visible * sum(length * -(-length // scale) for scale in scales)
    products = 2 if workload.direction == "forward" else 7
    return 2.0 * products * batch * pairs * dim
