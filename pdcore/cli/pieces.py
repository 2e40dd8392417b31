"""A long call computed in pieces, so that progress can be shown; the result is the same.

Three cuts are exact. *Sequences* are independent of one another, unless statistics are taken over
the batch. *Rows* are independent given the keys, whatever the spec, for statistics depend on keys
only; a block of rows is the same call with fewer queries and a larger offset. *Heads* are
independent too. Scores are cut by rows, and features by heads: the sums over the keys would
otherwise be computed again for every block of rows. So are scores with segments, each of which has
positions of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..attention import bind
from ..lowering import Plan, Scores
from ..spec import AttentionSpec, Batch, HeadScaling

__all__ = ["Piece", "attend_in_pieces", "divide"]

#: Multiplications in a piece, which take a few tenths of a second on a small machine.
TARGET = 4e9
#: The fewest rows of a block; every block repeats the work on the keys.
ROWS = 512


class Piece(NamedTuple):
    """A part of a call.

    Attributes
    ----------
    axis : int
        The leading axis that `lead` cuts.
    lead : slice or None
        The slice of that axis; None for all of it.
    heads : slice or None
        The slice of the key heads; None for all.
    rows : slice or None
        The slice of the queries; None for all.
    cost : float
        Multiplications.
    """

    axis: int
    lead: slice | None
    heads: slice | None
    rows: slice | None
    cost: float


def divide(
    plan: Plan,
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    target: float = TARGET,
    *,
    packed: bool = False,
) -> list[Piece]:
    """Divide a call into pieces.

    Parameters
    ----------
    plan : Plan
        The plan of the call.
    q, k, v : tuple of int
        Shapes.
    target : float
        About how many multiplications a piece should have.
    packed : bool
        Whether the call has segments.

    Returns
    -------
    list of Piece
        Pieces that cover the result once; a single one for a call that is small or cannot be cut.
    """
    lead, rows, length = q[:-3], q[-2], k[-2]
    by_scores = isinstance(plan.contraction, Scores)
    width = length * (q[-1] + v[-1]) if by_scores else 2 * q[-1] * v[-1]
    cost = float(math.prod(lead) * q[-3] * rows * width)
    axis = max(range(len(lead)), key=lambda i: lead[i], default=0)
    whole = Piece(axis, None, None, None, cost)
    if cost <= 2 * target:
        return [whole]
    pieces = [whole]
    normalization = plan.spec.normalization
    over_batch = isinstance(normalization, Batch) and normalization.statistics == "batch"
    if lead and lead[axis] > 1 and not over_batch:
        cuts = _slices(lead[axis], max(1, int(target * lead[axis] / cost)))
        pieces = [whole._replace(lead=c, cost=cost * _share(c, lead[axis])) for c in cuts]
    if pieces[0].cost <= 2 * target:
        return pieces
    by_scores = by_scores and not packed
    size, least = (rows, ROWS) if by_scores else (k[-3], 1)
    step = max(least, int(target * size / pieces[0].cost) // least * least)
    return [
        Piece(
            axis,
            piece.lead,
            None if by_scores else cut,
            cut if by_scores else None,
            piece.cost * _share(cut, size),
        )
        for piece in pieces
        for cut in _slices(size, step)
    ]


def attend_in_pieces(
    arrays: Mapping[str, Any],
    plan: Plan,
    *,
    lse: bool = False,
    backend: str | list[str] | None = None,
    device: str | None = None,
    target: float = TARGET,
    done: Callable[[float], None] = lambda share: None,
) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """Compute attention of NumPy arrays piece by piece.

    Parameters
    ----------
    arrays : mapping
        The array arguments of `pdcore.attention`, checked already.
    plan : Plan
        The plan of the call, which decides how the call may be divided.
    lse : bool
        Whether to return the log-sum-exp.
    backend, device
        As in `pdcore.attention`.
    target : float
        See `divide`.
    done : callable
        Called after every piece with the share of the work that is done, up to 1.

    Returns
    -------
    outputs : dict of str to array
        ``out``, and ``lse`` if asked for; equal to one call's within rounding.
    pieces : int
        The number of pieces.
    """
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    packed = arrays.get("segments") is not None
    pieces = divide(plan, q.shape, k.shape, v.shape, target, packed=packed)
    total = sum(piece.cost for piece in pieces)
    outputs: dict[str, np.ndarray[Any, Any]] = {}
    bound: dict[AttentionSpec, Any] = {}
    finished = 0.0
    for piece in pieces:
        spec = _spec_of(plan.spec, piece)
        if spec not in bound:
            bound[spec] = bind(spec, backend=backend, device=device)
        result = bound[spec](**_arguments(arrays, piece), return_lse=lse)
        for name, part in zip(("out", "lse"), result if lse else (result,), strict=False):
            if len(pieces) == 1:
                outputs[name] = part
                continue
            if name not in outputs:
                shape = (*q.shape[:-1], v.shape[-1]) if name == "out" else q.shape[:-1]
                outputs[name] = np.empty(shape, dtype=part.dtype)
            outputs[name][_index(piece, q, k, name)] = part
        finished += piece.cost
        done(finished / total if total else 1.0)
    return outputs, len(pieces)


def _slices(size: int, step: int) -> list[slice]:
    """Return slices of nearly equal length, at most `step`, that cover a range."""
    count = -(-size // step)
    edges = [size * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _share(cut: slice, size: int) -> float:
    return float(cut.stop - cut.start) / size


def _spec_of(spec: AttentionSpec, piece: Piece) -> AttentionSpec:
    if piece.heads is None or not spec.heads.scales:
        return spec
    return replace(spec, heads=HeadScaling(spec.heads.scales[piece.heads], spec.heads.pool))


def _query_heads(piece: Piece, q: Any, k: Any) -> slice | None:
    if piece.heads is None:
        return None
    group = q.shape[-3] // k.shape[-3]
    return slice(piece.heads.start * group, piece.heads.stop * group)


def _index(piece: Piece, q: Any, k: Any, name: str) -> tuple[Any, ...]:
    """Return the index of a piece in an output."""
    index = [slice(None)] * (q.ndim if name == "out" else q.ndim - 1)
    if piece.lead is not None:
        index[piece.axis] = piece.lead
    index[q.ndim - 3] = _query_heads(piece, q, k) or slice(None)
    index[q.ndim - 2] = piece.rows or slice(None)
    return tuple(index)


def _arguments(arrays: Mapping[str, Any], piece: Piece) -> dict[str, Any]:
    q, k = arrays["q"], arrays["k"]
    lead = q.ndim - 3
    call = {name: value for name, value in arrays.items() if value is not None}
    if piece.rows is not None:
        call["offset"] = _first_position(call, piece.rows.start)
    for name, value in call.items():
        if name == "params":
            if piece.heads is not None:
                # Every parameter of features has the axis of the key heads first.
                call[name] = {n: p[piece.heads] for n, p in value.items()}
            continue
        if name in ("segments", "labels"):
            pair = value if isinstance(value, tuple) else (value, value)
            if piece.lead is not None:
                pair = tuple(x[(*(slice(None),) * piece.axis, piece.lead)] for x in pair)
            of_rows = pair[0] if piece.rows is None else pair[0][..., piece.rows]
            call[name] = (of_rows, pair[1])
            continue
        if not isinstance(value, np.ndarray) or not value.ndim:
            continue
        # Masks and biases broadcast, so their axes count from the right.
        missing = q.ndim - value.ndim if name in ("q", "k", "v", "mask", "bias") else 0
        cuts = {piece.axis - missing: piece.lead}
        if name in ("q", "mask", "bias"):
            cuts[lead - missing] = _query_heads(piece, q, k)
            cuts[lead + 1 - missing] = piece.rows
        elif name in ("k", "v"):
            cuts[lead - missing] = piece.heads
        index = tuple(
            slice(None) if cuts.get(i) is None or value.shape[i] == 1 else cuts[i]
            for i in range(value.ndim)
        )
        call[name] = value[index]
    return call


def _first_position(call: Mapping[str, Any], start: int) -> Any:
    """Return the offset of a block of rows; ``"end"`` refers to all rows of the call."""
    offset = call.get("offset", 0)
    if not isinstance(offset, str):
        return offset + start
    rows, length = call["q"].shape[-2], call["k"].shape[-2]
    key_mask = call.get("key_mask")
    if key_mask is None:
        return length - rows + start
    last = np.max(np.where(key_mask, np.arange(1, length + 1), 0), axis=-1, initial=0)
    return last - rows + start
