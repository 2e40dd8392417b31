"""The operands of a contraction as its CUDA kernels read them: pointers, strides and sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pdcore.extend import Operands, Scores

__all__ = ["NULL", "SHAPE", "Packed", "in_rows", "one_lead", "packed", "record", "strides_of"]

#: No array: eight bytes of 0, passed by value where a kernel expects a pointer.
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
        ("scale", np.float64),
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
        ("bias_extent", np.int32, 5),
    ],
    align=True,
)


class Packed(NamedTuple):
    """The operands of a contraction.

    Attributes
    ----------
    arrays : tuple
        The first arguments of every kernel, INPUTS of kernels/operands.cuh; NULL for none.
    shape : numpy.void
        The last argument, a `SHAPE`, which is passed by value.
    batch, heads, group, rows, keys, dim, value_dim : int
        With the leading axes as one, `batch`.
    bias_extent : tuple of int
        The bias's own shape, with the leading axes as one.
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


def packed(c: Scores, o: Operands, names: tuple[str, ...], *, xp: Any) -> Packed:
    """Pack the operands; arrays that rows cannot be read from as they are get copied."""
    seen = o.visibility
    *lead, heads, group, rows, dim = o.q.shape
    batch, (keys, value_dim) = math.prod(lead), o.v.shape[-2:]
    q, k, v = (in_rows(one_lead(x, lead, xp), xp) for x in (o.q, o.k, o.v))
    bias = None if o.bias is None else one_lead(o.bias, lead, xp)
    mask = None if seen.mask is None else one_lead(seen.mask, lead, xp)
    key_mask, real = (
        None if x is None else xp.ascontiguousarray(xp.reshape(x, (batch, x.shape[-1])))
        for x in (seen.key_mask, seen.real)
    )
    key_bias = None if o.key_bias is None else xp.ascontiguousarray(o.key_bias)
    values = None
    if names:
        # One row a head, as a kernel reads them.
        values = xp.stack([xp.reshape(o.values[n], (heads,)) for n in names], axis=-1)
    offsets = None if seen.static else xp.ascontiguousarray(xp.reshape(seen.offset, (-1,)))
    if offsets is not None and offsets.shape[0] != batch:
        offsets = xp.ascontiguousarray(xp.broadcast_to(offsets, (batch,)))
    extent = (1,) * 5 if bias is None else tuple(bias.shape)
    members = (q, k, v, key_bias, bias, key_mask, real, mask, offsets, values)
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
            "key_mask": seen.keys,
            "real": seen.length,
            "offset": seen.offset if seen.static else 0,
            "ahead": _bound(seen.support.ahead),
            "left": _bound(seen.support.left),
            "scale": c.scale,
            "length": seen.length,
            "span": seen.scale,
            "has_sign": c.signed,
            "bias_extent": extent,
        },
    )
    return Packed(arrays, shape, *sizes, extent)


def record(dtype: Any, members: Mapping[str, Any]) -> Any:
    """Give a structure with these members, 0 elsewhere."""
    structure = np.zeros((), dtype)
    for name, value in members.items():
        structure[name] = value
    return structure[()]


def one_lead(x: Any, lead: Sequence[int], xp: Any) -> Any:
    """Make the leading axes one; of length 1 where the array is the same for all of them."""
    leading, rest = tuple(x.shape[: len(lead)]), tuple(x.shape[len(lead) :])
    if math.prod(leading) == 1:
        return xp.reshape(x, (1, *rest))
    if leading != tuple(lead):  # the same for some: no stride says that
        x = xp.broadcast_to(x, (*lead, *rest))
    return xp.reshape(x, (math.prod(lead), *rest))


def in_rows(x: Any, xp: Any) -> Any:
    """Give an array whose columns lie beside each other."""
    return x if x.shape[-1] <= 1 or x.strides[-1] == x.itemsize else xp.ascontiguousarray(x)


def strides_of(x: Any) -> tuple[int, ...]:
    """Give strides in entries, 0 along axes of length 1."""
    return tuple(
        0 if size == 1 else stride // x.itemsize
        for size, stride in zip(x.shape, x.strides, strict=True)
    )


def _bound(reach: float) -> int:
    return -1 if reach == math.inf else int(reach)
