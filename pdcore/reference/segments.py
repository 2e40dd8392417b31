"""Packed sequences by their definition: every segment is cut out, and is a call of its own.

Only ``batch`` statistics see more than one segment: mean and variance are computed here, over the
pooled keys of all segments, and every segment gets them as ``running`` ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..spec import Batch, Identity
from .inputs import ReferenceCall, positions
from .normalizations import moments
from .pooling import pooled_keys

__all__ = ["over_segments"]

#: The rows of one sequence, as half-open ranges of its queries, and their keys.
Block = tuple[slice, slice]


def over_segments(
    call: ReferenceCall,
    segments: Any,
    offset: Any,
    function: Callable[[ReferenceCall], tuple[Any, ...]],
    *,
    at_keys: bool = False,
) -> tuple[Any, ...]:
    """Apply a function to every segment as a call of its own, and join the results.

    Parameters
    ----------
    call : ReferenceCall
        The whole call.
    segments : integer array, or pair of integer arrays
        The ids of queries and keys, as in `reference_attention`.
    offset : int, integer array () or "end"
        That of every segment.
    function : callable
        From a call without leading axes to arrays whose second axis is that of the queries.
    at_keys : bool
        Whether the third axis is that of the keys: it is padded by zeros to the whole sequence.

    Returns
    -------
    tuple of array
        The results, with the leading axes of the call.
    """
    xp, lead = call.xp, tuple(call.q.shape[:-3])
    if not math.prod(lead):
        return function(call)
    q_ids, k_ids = _ids(segments, call, offset)
    blocks = {index: _blocks(q_ids[index], k_ids[index]) for index in np.ndindex(*lead)}
    call = _with_batch_statistics(call, blocks)
    rows = []
    for index, cuts in blocks.items():
        parts: list[list[Any]] = []
        for of_q, of_k in cuts:
            if of_q.stop > of_q.start or not parts:
                results = function(_cut(call, index, of_q, of_k, offset))
                parts.append([_at_keys(x, of_k, call) if at_keys else x for x in results])
        rows.append([xp.concat(x, axis=1) for x in zip(*parts, strict=True)])
    joined = (xp.stack(x, axis=0) for x in zip(*rows, strict=True))
    return tuple(xp.reshape(x, (*lead, *x.shape[1:])) for x in joined)


def _ids(segments: Any, call: ReferenceCall, offset: Any) -> tuple[Any, Any]:
    """Check the ids of queries and keys, and return them as arrays of NumPy."""
    pair = segments if isinstance(segments, tuple | list) else (segments, segments)
    q_ids, k_ids = (np.asarray(x) for x in pair)
    lead = tuple(call.q.shape[:-3])
    for ids, length in ((q_ids, call.q.shape[-2]), (k_ids, call.k.shape[-2])):
        if ids.dtype.kind not in "iu" or ids.shape != (*lead, length):
            expected = (*lead, length)
            raise ValueError(f"segments: got {ids.dtype} {ids.shape}, expected integers {expected}")
    if getattr(offset, "ndim", 0):
        raise ValueError("offset: got one for each sequence, expected one for all segments")
    return q_ids, k_ids


def _blocks(q_ids: Any, k_ids: Any) -> list[Block]:
    """Return the ranges of queries in their order, each with the range of its keys.

    The ranges of queries are all rows; those of segments without queries, which are empty, come
    last. Queries of padding have no keys.
    """
    of_k = {int(i): _run(k_ids, i) for i in np.unique(k_ids[k_ids >= 0])}
    of_q = {int(i): _run(q_ids, i) for i in np.unique(q_ids[q_ids >= 0])}
    none, blocks, done = slice(0, 0), [], 0
    for i, rows in sorted(of_q.items(), key=lambda item: int(item[1].start)):
        if done < rows.start:
            blocks.append((slice(done, rows.start), none))
        blocks.append((rows, of_k.pop(i, none)))
        done = rows.stop
    if done < len(q_ids) or not blocks:
        blocks.append((slice(done, len(q_ids)), none))
    return blocks + [(none, keys) for keys in of_k.values()]


def _run(ids: Any, i: int) -> slice:
    """Return the range of positions that have the id i, which must be consecutive."""
    places = np.flatnonzero(ids == i)
    run = slice(int(places[0]), int(places[-1]) + 1)
    if places.size != run.stop - run.start:
        raise ValueError(f"segments: the id {i} stands in more than one run of a sequence")
    return run


def _cut(
    call: ReferenceCall, index: tuple[int, ...], rows: slice, keys: slice, offset: Any
) -> ReferenceCall:
    """Return the call of some rows of a sequence, on some of its keys."""
    every = slice(None)
    real = call.real[(*index, keys)]
    none = keys.stop == keys.start
    q = call.q[(*index, every, rows)]
    spec = call.spec
    if none:  # rows that see no key, whatever they are normalized by; padding may hold NaN
        q, spec = call.xp.zeros_like(q), replace(spec, normalization=Identity())
    else:
        spec.check_keys(keys.stop - keys.start)
    return replace(
        call,
        spec=spec,
        q=q,
        k=call.k[(*index, every, keys)],
        v=call.v[(*index, every, keys)],
        real=real,
        mask=None if call.mask is None else call.mask[(*index, every, rows, keys)],
        bias=None if call.bias is None else call.bias[(*index, every, rows, keys)],
        labels=call.labels
        and tuple(x[(*index, at)] for x, at in zip(call.labels, (rows, keys), strict=True)),
        position=positions(offset, real, q.shape[-2], False, call.xp, call.device),
    )


def _at_keys(x: Any, keys: slice, call: ReferenceCall) -> Any:
    """Pad weights (H, n, m) of some keys of a sequence by zeros for the others."""
    before, after = (
        call.xp.zeros((*x.shape[:2], count), dtype=x.dtype, device=call.device)
        for count in (keys.start, call.k.shape[-2] - keys.stop)
    )
    return call.xp.concat([before, x, after], axis=-1)


def _with_batch_statistics(
    call: ReferenceCall, blocks: Mapping[tuple[int, ...], list[Block]]
) -> ReferenceCall:
    """Return the call with ``batch`` statistics as parameters, over the keys of all segments."""
    t, xp, none = call.spec.normalization, call.xp, slice(0, 0)
    if not (isinstance(t, Batch) and t.statistics == "batch"):
        return call
    cuts = [
        _cut(call, index, none, keys, 0)
        for index, cut in blocks.items()
        for _, keys in cut
        if keys != none
    ]
    found = []
    for g in range(call.k.shape[-3] if cuts else 0):
        heads = [pooled_keys(cut, g) for cut in cuts]
        keys = xp.concat([keys for keys, _, _ in heads], axis=0)
        real = xp.concat([xp.any(in_window, axis=-1) for _, in_window, _ in heads], axis=0)
        found.append(moments(keys, real[:, None], 0, xp))
    if not found:
        return call  # no row sees a key
    mean, var = (xp.concat(x, axis=0) for x in zip(*found, strict=True))  # (Hkv, D)
    spec = replace(call.spec, normalization=replace(t, statistics="running"))
    return replace(call, spec=spec, params={**call.params, "mean": mean, "var": var})
