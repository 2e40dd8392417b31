"""What of a timed call is compared with the oracle: a sample of rows, and of heads if many.

The arrays and the expected results of the last workloads are kept, as the backend and all peers
need the same ones.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pdcore.extend import parameter_shape
from pdcore.spec import as_spec

from ..judge.budget import Expected, expect
from ..judge.calls import dtype_of
from .workload import Shape, Workload

__all__ = ["Sample", "draw", "required", "sampled"]

Array = np.ndarray[Any, Any]
#: The number of rows that are compared.
SAMPLE = 32
#: The rows of all heads together beyond which two heads are compared in place of all.
ALL_HEADS = 2**16


def draw(workload: Workload) -> dict[str, Array]:
    """Draw q, k, v and the cotangent d as NumPy arrays; they are the same for every spec."""
    return _drawn(workload.shape, workload.dtype)


@lru_cache(maxsize=2)
def _drawn(shape: Shape, dtype: str) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, dtype=np.float32).astype(dtype_of(dtype))
        for name in "qkvd"
    }


def required(workload: Workload) -> dict[str, Array]:
    """Return the parameters without a default as NumPy arrays, as they start in a layer, or 0."""
    _, heads, _, dim = workload.shape
    return {
        p.name: np.full(parameter_shape(p.shapes[0], heads, dim), p.start or 0.0, np.float32)
        for p in as_spec(workload.spec).parameters()
        if p.default is None
    }


class Sample(NamedTuple):
    """The rows and heads of a workload that are compared, and what is expected of them.

    Attributes
    ----------
    rows : array of int
    heads : (list of int, list of int) or None
        The sequences and heads, two of them; None for all.
    cotangent : array (B, H, N, D)
        Zero outside of the rows. Gradients are linear in the cotangent, so they depend on these
        rows only.
    expected : Expected
    """

    rows: Array
    heads: tuple[list[int], list[int]] | None
    cotangent: Array
    expected: Expected

    def of(self, x: Array, *, rows: bool) -> Array:
        """Return the compared part of a result or of a gradient."""
        x = _of_heads(x, self.heads)
        return x[..., self.rows, :] if rows else x


def _of_heads(x: Array, heads: tuple[list[int], list[int]] | None) -> Array:
    return x if heads is None else x[heads][None]


@lru_cache(maxsize=4)
def sampled(workload: Workload) -> Sample:
    """Choose the rows and heads of a workload that are compared with the oracle."""
    drawn = draw(workload)
    batch, count, length, _ = workload.shape
    rows, call = np.unique(np.linspace(0, length - 1, SAMPLE).astype(int)), dict[str, Any]()
    heads, spec = None, as_spec(workload.spec)
    if spec.support.restricts:  # adjacent rows, whose position one offset describes
        rows = np.arange(length // 2, min(length, length // 2 + SAMPLE))
        call["offset"] = int(rows[0])
    cotangent = np.zeros_like(drawn["d"])
    cotangent[..., rows, :] = drawn["d"][..., rows, :]
    if params := required(workload):
        call["params"] = params
    if workload.segments:
        ids = workload.segment_ids()[0]
        call["mask"] = ids[rows, None] == ids
    if batch * count * length > ALL_HEADS and not spec.parameters():
        heads = [0, batch - 1], [0, count - 1]
        spec = spec.for_heads(count)
        if spec.heads.scales:
            scales = (spec.heads.scales[0], spec.heads.scales[-1])
            spec = replace(spec, heads=replace(spec.heads, scales=scales))
    q, k, v, d = (_of_heads(x, heads) for x in (drawn["q"], drawn["k"], drawn["v"], cotangent))
    if workload.direction != "forward":
        call["d_out"] = d[..., rows, :]
    expected = expect(q[..., rows, :], k, v, spec, **call)
    return Sample(rows, heads, cotangent, expected)
