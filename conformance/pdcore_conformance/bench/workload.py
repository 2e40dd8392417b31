"""The calls that the bench times."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pdcore.spec import as_spec

__all__ = ["DIRECTIONS", "Shape", "Workload", "half_pooled", "operations", "parsed_shape"]

#: (B, H, N, D) of q, k and v.
Shape = tuple[int, int, int, int]

#: What is timed: the result alone, or the result and the gradients of q, k and v.
DIRECTIONS = ("forward", "forward+backward")


def half_pooled(heads: int) -> str:
    """Return the spec of Attention-SH with half of the heads at scale 2."""
    return f"sh({','.join('1' * (heads // 2) + '2' * (heads - heads // 2))})"


def parsed_shape(text: str) -> Shape:
    """Return a shape from text such as ``1,8,1024,64``.

    Raises
    ------
    ValueError
        For anything but four positive numbers.
    """
    parts = [part.strip(" ()") for part in text.split(",")]
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"shape: got {text!r}, expected B,H,N,D, four numbers from 1")
    batch, heads, length, dim = map(int, parts)
    return batch, heads, length, dim


class Workload(NamedTuple):
    """A call whose time is measured.

    Attributes
    ----------
    spec : str
    shape : tuple of int
        (B, H, N, D) of q, k and v.
    dtype : str
    direction : {"forward", "forward+backward"}
    segments : int
        The number of equal segments of a sequence; 0 for a call without segments.
    """

    spec: str
    shape: Shape
    dtype: str = "float32"
    direction: str = "forward"
    segments: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.dtype} {self.direction}"

    @property
    def name(self) -> str:
        """The spec, with the number of segments where there are any."""
        return f"{self.spec} segments={self.segments}" if self.segments else self.spec

    def segment_ids(self) -> np.ndarray[Any, Any]:
        """Return the id of the segment of each position, (B, N)."""
        batch, _, length, _ = self.shape
        ids = np.arange(length) * self.segments // length
        return np.ascontiguousarray(np.broadcast_to(ids, (batch, length)))

    def apart(self) -> Workload:
        """Return the call whose sequences are the segments."""
        batch, heads, length, dim = self.shape
        shape = (batch * self.segments, heads, length // self.segments, dim)
        return self._replace(shape=shape, segments=0)


def operations(workload: Workload) -> float:
    """Return the number of operations in a call's matrix products.

    There are two products forward and five backward. Pairs that a causal call hides are not
    counted, and a head of scale s has one key for every s keys.
    """
    batch, heads, length, dim = workload.shape
    scales = as_spec(workload.spec).for_heads(heads).heads.scales or (1,) * heads
    visible = 0.5 if "causal" in workload.spec else 1.0
    pairs = visible * sum(length * -(-length // scale) for scale in scales)
    pairs /= workload.segments or 1
    products = 2 if workload.direction == "forward" else 7
    return 2.0 * products * batch * pairs * dim
