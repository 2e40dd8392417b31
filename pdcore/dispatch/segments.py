"""The ids of packed sequences: made of lengths, checked, and read as ranges of positions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..arrays import dtype_name, host_values, library_of
from ..backend import Inputs
from ..errors import UnsupportedError
from ..spec import AttentionSpec, Batch
from .spans import Span

__all__ = [
    "Segment",
    "check_segments",
    "pair_of",
    "on_host",
    "places",
    "ranges",
    "segments_from_cu_seqlens",
    "segments_from_lengths",
    "segments_kind",
    "shares_statistics",
]


class Segment(NamedTuple):
    """The queries and keys of a segment, as half-open ranges of one sequence.

    Attributes
    ----------
    sequence : int
        The index of the sequence, over all leading axes.
    first_row, rows : int
        The first query, and the number of queries.
    first_key, keys : int
        The first key, and the number of keys.
    """

    sequence: int
    first_row: int
    rows: int
    first_key: int
    keys: int


def segments_from_lengths(lengths: Any, total: int | None = None) -> Any:
    """Return the ids of segments that follow one another, for ``segments=``.

    Parameters
    ----------
    lengths : sequence of int, or integer array (S,)
        The number of positions of each segment.
    total : int, optional
        The number of all positions, those of padding at the end included; by default the sum.

    Returns
    -------
    integer array (total,)
        0 to S - 1, and -1 for padding; an array of NumPy, or of the library of `lengths`. For
        sequences with leading axes, stack those of each sequence.

    Raises
    ------
    TypeError, ValueError
        For lengths that are no integers, that are negative, or that exceed `total`.

    Examples
    --------
    >>> segments_from_lengths([3, 2], total=6)
    array([ 0,  0,  0,  1,  1, -1])
    """
    return _like(lengths, _ids(_integers(lengths, "lengths"), total, "lengths"))


def segments_from_cu_seqlens(cu_seqlens: Any, total: int | None = None) -> Any:
    """Return the ids of segments from their boundaries, as kernels for packed sequences take them.

    Parameters
    ----------
    cu_seqlens : sequence of int, or integer array (S + 1,)
        0, and the end of each segment: the cumulated lengths.
    total : int, optional
        The number of all positions, as in `segments_from_lengths`.

    Returns
    -------
    integer array (total,)
        As `segments_from_lengths` returns.

    Raises
    ------
    TypeError, ValueError
        For boundaries that are no integers, that do not begin with 0 or that descend.

    Examples
    --------
    >>> segments_from_cu_seqlens([0, 3, 5])
    array([0, 0, 0, 1, 1])
    """
    ends = _integers(cu_seqlens, "cu_seqlens")
    if not len(ends) or ends[0] != 0:
        got = f"{ends[0]} as the first" if len(ends) else "none"
        raise ValueError(f"cu_seqlens: got {got}, expected 0 and the end of each segment")
    return _like(cu_seqlens, _ids(np.diff(ends), total, "cu_seqlens"))


def _integers(x: Any, name: str) -> Any:
    values = host_values(x) if hasattr(x, "dtype") else np.asarray(x)
    if values is None:
        raise TypeError(f"{name}: got a traced array, expected numbers; make the ids outside")
    if values.size == 0 and values.ndim == 1:
        values = values.astype(np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        got = f"{values.dtype} {values.shape}"
        raise TypeError(f"{name}: got {got}, expected integers of one axis")
    return values.astype(np.int64)


def _ids(lengths: Any, total: int | None, name: str) -> Any:
    if np.any(lengths < 0):
        raise ValueError(
            f"{name}: got a segment of {np.min(lengths)} positions, expected 0 or more"
        )
    packed = int(np.sum(lengths))
    total = packed if total is None else total
    if packed > total:
        raise ValueError(f"total: got {total}, expected at least the {packed} of {name}")
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return np.concatenate([ids, np.full(total - packed, -1)])


def _like(x: Any, ids: Any) -> Any:
    """Return ids in the library and on the device of an array."""
    if not hasattr(x, "dtype") or isinstance(x, np.ndarray):
        return ids
    from array_api_compat import array_namespace, device

    return array_namespace(x).asarray(ids, device=device(x))


def pair_of(segments: Any) -> tuple[Any, Any]:
    """Return the ids of queries and those of keys."""
    if isinstance(segments, tuple | list):
        return segments[0], segments[-1]
    return segments, segments


def check_pair(argument: str, what: str, pair: Any, q: Any, k: Any) -> None:
    """Check the shapes and dtypes of integers of queries and keys, one array or a pair."""
    lead, rows, keys = tuple(q.shape[:-3]), q.shape[-2], k.shape[-2]
    of_both = f"the {what} of queries {(*lead, rows)} and those of keys {(*lead, keys)}"
    expected = f"integer {what} {(*lead, rows)} for queries and keys alike" + (
        "" if rows == keys else f", or a pair, {(*lead, rows)} and {(*lead, keys)}"
    )
    two = isinstance(pair, tuple | list)
    if two and len(pair) != 2:
        raise ValueError(f"{argument}: got {len(pair)} arrays, expected one, or a pair: {of_both}")
    if not two and rows != keys:
        raise ValueError(
            f"{argument}: got one array for {rows} queries and {keys} keys, expected a pair: "
            f"{of_both}"
        )
    for name, x, length in zip(("q", "k"), pair_of(pair), (rows, keys), strict=True):
        if not hasattr(x, "dtype"):
            raise TypeError(f"{argument}: got {type(x).__name__}, expected {expected}")
        whose = f"{argument} ({name})" if two else argument
        if not dtype_name(x).startswith(("int", "uint")):
            raise TypeError(f"{whose}: got dtype {dtype_name(x)}, expected an integer dtype")
        if tuple(x.shape) != (*lead, length):
            raise ValueError(
                f"{whose}: got shape {tuple(x.shape)}, expected {(*lead, length)}, the {what} of "
                "each sequence"
            )


def check_segments(segments: Any, q: Any, k: Any, offset: Any, sharding: str | None) -> None:
    """Check the shapes and dtypes of ids, and that the other arguments have a meaning with them."""
    check_pair("segments", "ids", segments, q, k)
    if getattr(offset, "ndim", 0):
        raise ValueError(
            f"offset: got shape {tuple(offset.shape)} with segments, expected an int, an integer "
            "array () or 'end': each segment has positions of its own, and one offset is for all"
        )
    if sharding is not None:
        raise UnsupportedError(
            f"segments: not with {sharding}: a segment may lie on two shards; call "
            "the whole sequences, or shard the batch"
        )


def on_host(inputs: Inputs) -> Inputs:
    """Return the inputs with ids as arrays of NumPy, where their values are at hand."""
    library, ids = library_of(inputs.q, "q"), []
    pair = isinstance(inputs.segments, tuple | list)
    for x in inputs.segments if pair else (inputs.segments,):
        if not hasattr(x, "dtype"):
            return inputs  # `check_segments` says what is wrong with them
        if (other := library_of(x, "segments")) not in (library, "numpy"):
            raise TypeError(
                f"segments: got an array of {other}, expected {library} like q, or NumPy"
            )
        values = host_values(x)
        if values is None:
            return inputs
        ids.append(values)
    return inputs._replace(segments=tuple(ids) if pair else ids[0])


def segments_kind(segments: Any) -> str | None:
    """Return the kind of ids, see `Request.segments`."""
    if segments is None:
        return None
    first, second = pair_of(segments)
    ids = (x for x in (first, second) if hasattr(x, "dtype"))
    if all(host_values(x) is not None for x in ids):
        return "values"
    return "traced" if first is second else "traced_pair"


def shares_statistics(spec: AttentionSpec) -> bool:
    """Return whether statistics are taken over all segments, not over each."""
    return isinstance(spec.normalization, Batch) and spec.normalization.statistics == "batch"


def ranges(segments: Any, lead: tuple[int, ...]) -> list[Segment]:
    """Return the segments of all sequences, from ids that are arrays of NumPy.

    Raises
    ------
    ValueError
        For an id that stands in more than one run of a sequence.
    """
    q_ids, k_ids = (np.reshape(x, (math.prod(lead), x.shape[-1])) for x in pair_of(segments))
    found = []
    for sequence, (of_q, of_k) in enumerate(zip(q_ids, k_ids, strict=True)):
        rows, keys = _runs(of_q, sequence, "queries"), _runs(of_k, sequence, "keys")
        for i in (*rows, *(i for i in keys if i not in rows)):
            found.append(Segment(sequence, *rows.get(i, (0, 0)), *keys.get(i, (0, 0))))
    return found


def places(segments: list[Segment]) -> tuple[list[Span], list[Span]]:
    """Return the ranges of the queries and those of the keys of segments."""
    rows = [(s.sequence, s.first_row, s.rows) for s in segments]
    return rows, [(s.sequence, s.first_key, s.keys) for s in segments]


def _runs(ids: Any, sequence: int, whose: str) -> dict[int, tuple[int, int]]:
    """Return the first position and the length of each run of an id >= 0."""
    if not ids.size:
        return {}
    first = np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1])
    lengths = np.diff(np.concatenate([first, [ids.size]]))
    runs: dict[int, tuple[int, int]] = {}
    for i, start, length in zip(ids[first].tolist(), first.tolist(), lengths.tolist(), strict=True):
        if i in runs:
            raise ValueError(
                f"segments: the id {i} of {whose} stands at {runs[i][0]} and again at {start} in "
                f"sequence {sequence}, expected one run of consecutive positions for each id >= 0"
            )
        if i >= 0:
            runs[i] = start, length
    return runs
