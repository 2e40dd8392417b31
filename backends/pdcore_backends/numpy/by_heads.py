"""Transforms of some heads at a time, on all cores: their temporary arrays stay in the caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdcore.extend import Pullback, Rows, Transform

from . import threads

__all__ = ["ByHeads"]

_ELEMENTS = 2**17  # entries of the queries of a part; with fewer, the interpreter's overhead shows

#: The axis of heads of each field of `Rows`.
_HEADS = {"q": -3, "k": -3, "key_bias": -2, "row_constant": -2, "key_mask": -2}


@dataclass(frozen=True)
class ByHeads:
    """A transform that treats heads alone and leaves q, k and a row constant, like `Fold`.

    Attributes
    ----------
    transform : Transform
        The transform.
    """

    transform: Transform

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback; see `Rows`."""
        heads = rows.q.shape[-3]
        size = max(1, _ELEMENTS * heads // max(1, rows.q.size))
        if size >= heads:
            return self.transform(rows, state, params, xp=xp)
        parts = [slice(a, min(a + size, heads)) for a in range(0, heads, size)]
        workers = threads.count()
        q, k = np.empty_like(rows.q), np.empty_like(rows.k)
        constant = np.empty(q.shape[:-1], q.dtype)

        def of(at: slice) -> tuple[Rows, Pullback]:
            read = (_cut_all(x, at, heads) for x in (state, params))
            return self.transform(_cut_rows(rows, at, heads), *read, xp=xp)

        def run(at: slice) -> None:
            part, _ = of(at)
            q[..., at, :, :], k[..., at, :, :] = part.q, part.k
            constant[..., at, :] = part.row_constant

        threads.run(run, parts, workers)

        def pullback(d: Rows) -> tuple[Rows, Mapping[str, Any], Mapping[str, Any]]:
            dq, dk = np.empty_like(q), np.empty_like(k)
            grads: dict[int, Any] = {}

            def pull(at: slice) -> None:
                # The pullback of the call would hold temporary arrays of all heads.
                _, again = of(at)
                part, *grads[at.start] = again(_cut_rows(d, at, heads))
                dq[..., at, :, :], dk[..., at, :, :] = part.q, part.k

            threads.run(pull, parts, workers)
            in_order = [grads[at.start] for at in parts]
            d_state, d_params = (
                _joined([grad[i] for grad in in_order], like, heads)
                for i, like in enumerate((state, params))
            )
            return Rows(dq, dk), d_state, d_params

        return rows._replace(q=q, k=k, row_constant=constant), pullback


def _cut(x: Any, at: slice, axis: int, heads: int) -> Any:
    """Return some heads of an array; the array itself where all heads share it."""
    if x is None or x.ndim < -axis or x.shape[axis] != heads:
        return x
    return x[(..., at, *(slice(None),) * (-axis - 1))]


def _cut_rows(rows: Rows, at: slice, heads: int) -> Rows:
    return rows._replace(
        **{name: _cut(getattr(rows, name), at, axis, heads) for name, axis in _HEADS.items()}
    )


def _cut_all(arrays: Mapping[str, Any], at: slice, heads: int) -> dict[str, Any]:
    return {name: _cut(x, at, -3, heads) for name, x in arrays.items()}


def _joined(parts: list[Mapping[str, Any]], like: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Join the gradients of parts: heads of one array, or summands of one that all heads share."""
    joined = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        shared = like[name].ndim < 3 or like[name].shape[-3] != heads
        joined[name] = sum(arrays[1:], arrays[0]) if shared else np.concatenate(arrays, axis=-3)
    return joined
