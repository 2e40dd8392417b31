"""The operands of a contraction as its CUDA kernels read them: pointers, strides and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pdcore.extend import Operands, Scores
from pdcore.extend import dropout as streams

__all__ = ["NULL", "SHAPE", "Packed", "in_rows", "one_lead", "packed", "record", "strides_of"]

#: A null pointer: eight bytes of 0, passed by value in place of an array.
NULL = np.uint64(0)

#: `Shape` of kernels/operands.cuh, member by member.
SHAPE = np.dtype(
    [
        ("q", np.int64, 4),
        ("k", np.int64, 3),
        ("v", np.int64, 3),
        ("bias", np.int64, 5),
        ("mask", np.int64, 5),
        ("key_mask", np.int64),
        ("real", np.int64),
        ("offset", np.int64),
        ("ahead", np.int64),
        ("left", np.int64),
        ("first_key", np.int64),
        ("scale", np.float64),
        ("factor", np.float64),
        *(
            (n, np.int32)
            for n in (
                "batch",
                "heads",
                "group",
                "rows",
                "keys",
                "length",
                "span",
                "dim",
                "value_dim",
                "has_sign",
            )
        ),
        ("least", np.uint32),
        ("bias_extent", np.int32, 5),
    ],
    align=True,
)


class Packed(NamedTuple):
    """The operands of a contraction.

    Attributes
    ----------
    arrays : tuple
        The first arguments of every kernel, INPUTS of kernels/operands.cuh; NULL if absent.
    shape : numpy.void
        The last argument, a `SHAPE` that is passed by value.
    batch, heads, group, rows, keys, dim, value_dim : int
        Sizes; `batch` is the product of the leading axes.
    bias_extent : tuple of int
        The shape of the bias, with the leading axes merged into one.
    """

    arrays: tuple[Any, ...]
    shape: Any
    batch: int
    heads: int
    group: int
    rows: int
    keys: int
    dim: int
    value_dim: int
    bias_extent: tuple[int, ...]


def packed(
    c: Scores,
    o: Operands,
    names: tuple[str, ...],
    tables: tuple[tuple[str, int, int], ...] = (),
    *,
    xp: Any,
) -> Packed:
    """Build the arguments of a kernel; arrays whose rows are not contiguous are copied."""
    visibility = o.visibility
    *lead, heads, group, rows, dim = o.q.shape
    batch, (keys, value_dim) = math.prod(lead), o.v.shape[-2:]
    q, k, v = (in_rows(one_lead(x, lead, xp), xp) for x in (o.q, o.k, o.v))
    bias = None if o.bias is None else one_lead(o.bias, lead, xp)
    mask = None if visibility.mask is None else one_lead(visibility.mask, lead, xp)
    key_mask, real = (
        None if x is None else xp.ascontiguousarray(xp.reshape(x, (batch, x.shape[-1])))
        for x in (visibility.key_mask, visibility.real)
    )
    key_bias = None if o.key_bias is None else xp.ascontiguousarray(o.key_bias)
    # A kernel reads one row of scalars, and one of entries, for each query head.
    values, entries = (
        _by_query_head([o.values[n] for n in chosen], heads, group, xp)
        for chosen in (names, [name for name, _, _ in tables])
    )
    labels = (None, None)
    if visibility.labels is not None:
        labels = tuple(
            xp.ascontiguousarray(
                xp.reshape(
                    xp.broadcast_to(xp.astype(x, xp.int64), (*lead, 1, 1, x.shape[-1])),
                    (batch, x.shape[-1]),
                )
            )
            for x in visibility.labels
        )
    lanes, dropout = None, {}
    if o.dropout is not None:
        lanes = xp.ascontiguousarray(xp.stack([x.astype("uint32") for x in o.dropout.lanes], -1))
        least = streams.threshold(o.dropout.p)
        dropout = {"least": least, "factor": o.dropout.factor, "first_key": o.dropout.first}
    offsets = (
        None if visibility.static else xp.ascontiguousarray(xp.reshape(visibility.offset, (-1,)))
    )
    if offsets is not None and offsets.shape[0] != batch:
        offsets = xp.ascontiguousarray(xp.broadcast_to(offsets, (batch,)))
    extent = (1,) * 5 if bias is None else tuple(bias.shape)
    members = (
        q,
        k,
        v,
        key_bias,
        bias,
        key_mask,
        real,
        mask,
        offsets,
        values,
        entries,
        *labels,
        lanes,
    )
    arrays = tuple(NULL if x is None else x for x in members)
    sizes = (batch, heads, group, rows, keys, dim, value_dim)
    shape = record(
        SHAPE,
        {
            **{n: strides_of(x)[:-1] for n, x in (("q", q), ("k", k), ("v", v))},
            **{n: strides_of(x) for n, x in (("bias", bias), ("mask", mask)) if x is not None},
            **dict(
                zip(
                    ("batch", "heads", "group", "rows", "keys", "dim", "value_dim"),
                    sizes,
                    strict=True,
                )
            ),
            "key_mask": visibility.keys,
            "real": visibility.length,
            "offset": visibility.offset if visibility.static else 0,
            "ahead": _reach(visibility.support.ahead),
            "left": _reach(visibility.support.left),
            "scale": c.scale,
            "length": visibility.length,
            "span": visibility.scale,
            "has_sign": c.signed,
            "bias_extent": extent,
            **dropout,
        },
    )
    return Packed(arrays, shape, *sizes, extent)


def _by_query_head(arrays: Sequence[Any], heads: int, group: int, xp: Any) -> Any:
    """Return scalars and tables (H or 1, G or 1, n, m) joined to rows (H G, -1), or None."""
    if not arrays:
        return None
    spread = (xp.broadcast_to(x, (heads, group, *x.shape[-2:])) for x in arrays)
    rows = [xp.reshape(x, (heads * group, -1)) for x in spread]
    return xp.ascontiguousarray(xp.concat(rows, axis=-1))


def record(dtype: Any, members: Mapping[str, Any]) -> Any:
    """Build a structure with these members; the others are 0."""
    structure = np.zeros((), dtype)
    for name, value in members.items():
        structure[name] = value
    return structure[()]


def one_lead(x: Any, lead: Sequence[int], xp: Any) -> Any:
    """Return an array with one leading axis, of length 1 if the array is broadcast along it."""
    leading, rest = tuple(x.shape[: len(lead)]), tuple(x.shape[len(lead) :])
    if math.prod(leading) == 1:
        return xp.reshape(x, (1, *rest))
    if leading != tuple(lead):  # broadcast along some axes only: no single stride can express it
        x = xp.broadcast_to(x, (*lead, *rest))
    return xp.reshape(x, (math.prod(lead), *rest))


def in_rows(x: Any, xp: Any) -> Any:
    """Return an array whose rows are contiguous, copied if needed."""
    return x if x.shape[-1] <= 1 or x.strides[-1] == x.itemsize else xp.ascontiguousarray(x)


def strides_of(x: Any) -> tuple[int, ...]:
    """Return the strides in entries, 0 along axes of length 1."""
    return tuple(
        0 if size == 1 else stride // x.itemsize
        for size, stride in zip(x.shape, x.strides, strict=True)
    )


def _reach(reach: float) -> int:
    return -1 if reach == math.inf else int(reach)
