"""Check a call's arguments against the spec and against each other, before anything runs.

The checks read shapes, dtypes and libraries, never values of arrays: they run at the first call of
each signature only, and while a compiler traces a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays import check_form, dtype_name, library_of
from ..backend import LAYOUTS, Inputs, shape_in
from ..errors import UnsupportedError, nearest
from ..plugins import registered
from ..spec import AttentionSpec, Parameter
from .labels import check_labels
from .segments import check_segments, pair_of

__all__ = ["validate"]

FLOATS = ("float16", "bfloat16", "float32", "float64")


def validate(
    spec: AttentionSpec, inputs: Inputs, library: str, layout: str = "bhnd"
) -> AttentionSpec:
    """Check shapes, dtypes and libraries, and return the spec for the heads of k.

    Parameters
    ----------
    spec : AttentionSpec
        The attention of the call.
    inputs : Inputs
        The call's arguments, q, k and v (*B, H, N, D).
    library : str
        The library of q.
    layout : str
        The layout of the caller's arrays, in which messages show their shapes.

    Returns
    -------
    AttentionSpec
        See `AttentionSpec.for_heads`.

    Raises
    ------
    TypeError, ValueError
        For a wrong argument; the message names it, its value and what is expected.
    UnsupportedError
        For a bias that the spec does not support.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    check_form(q, "q", library, _libraries)
    _same_library(k, "k", library)
    _same_library(v, "v", library)
    for name, x in (("mask", inputs.mask), ("key_mask", inputs.key_mask), ("bias", inputs.bias)):
        if x is not None:
            _same_library(x, name, library)
    dtype = dtype_name(q)
    if dtype not in FLOATS:
        raise TypeError(f"q: got dtype {dtype}, expected one of {', '.join(FLOATS)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name}: got dtype {dtype_name(x)}, expected {dtype} like q; cast it yourself"
            )
    spec = _shapes(spec, q.shape, k.shape, v.shape, layout)
    if inputs.segments is None:
        spec.check_keys(k.shape[-2])
    else:
        check_segments(inputs.segments, q, k, inputs.offset, inputs.sharding)
    check_labels(spec, inputs)
    for x in () if inputs.labels is None else pair_of(inputs.labels):
        _same_library(x, "labels", library)
    lead = tuple(q.shape[:-3])
    if inputs.key_mask is not None:
        _boolean(inputs.key_mask, "key_mask")
        expected, shape = (*lead, k.shape[-2]), tuple(inputs.key_mask.shape)
        if shape != expected:
            raise ValueError(
                f"key_mask: got shape {shape}, expected {expected}: True for a real key of each "
                f"sequence{_other_layout(layout, shape == (*lead, k.shape[-3]))}"
            )
    if inputs.mask is not None:
        _boolean(inputs.mask, "mask")
        _broadcastable(inputs.mask, "mask", q.shape, k.shape, layout)
    if inputs.bias is not None:
        _bias(spec, inputs.bias, dtype)
        _broadcastable(inputs.bias, "bias", q.shape, k.shape, layout)
    _offset(inputs.offset, lead, library)
    _params(spec, inputs.params, (k.shape[-3], q.shape[-1], q.shape[-3]), dtype, library)
    return spec


def _same_library(x: Any, name: str, library: str) -> None:
    other = library_of(x, name)
    if other != library:
        raise TypeError(
            f"{name}: got an array of {other}, expected {library} like q; arrays of "
            "different libraries are not mixed, convert one side"
        )
    check_form(x, name, library, _libraries)


def _libraries() -> set[str]:
    """Return the libraries whose arrays some backend takes."""
    return {info.library for info in registered().values()}


def _shapes(spec: AttentionSpec, q: Any, k: Any, v: Any, layout: str) -> AttentionSpec:
    """Check shapes, and return the spec for the heads of k."""
    axes = _AXES[layout]

    def shown(shape: Any) -> tuple[int, ...]:
        return shape_in(layout, tuple(shape))

    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) < 3:
            raise ValueError(
                f"{name}: got shape {tuple(shape)}, expected at least three axes: {axes}"
            )
    if (
        not (len(q) == len(k) == len(v))
        or tuple(k[:-3]) != tuple(q[:-3])
        or tuple(v[:-3]) != tuple(q[:-3])
    ):
        raise ValueError(
            f"q, k, v: got shapes {shown(q)}, {shown(k)}, {shown(v)}, expected the "
            f"same leading axes {axes}"
        )
    if v[-3] != k[-3] or v[-2] != k[-2]:
        order = "heads and keys" if layout == "bhnd" else "keys and heads"
        raise ValueError(
            f"v: got shape {shown(v)}, expected {shown(k)[-3:-1]} {order} like k {shown(k)}"
        )
    if q[-1] != k[-1] or q[-1] < 1:
        raise ValueError(f"k: got {k[-1]} features, expected {q[-1]} like q {shown(q)}, at least 1")
    if not _divide(q[-3], k[-3]):
        raise ValueError(
            f"q: got {q[-3]} heads in {shown(q)}, expected a multiple of the {k[-3]} heads of k "
            f"{shown(k)}, at least one of each{_other_layout(layout, _divide(q[-2], k[-2]))}"
        )
    scales, owner = len(spec.heads.scales), "heads of k"
    if scales and scales != k[-3]:
        fits_swapped = _divide(q[-2], k[-2]) and scales == k[-2]
        owner = f"{owner} {shown(k)}{_other_layout(layout, fits_swapped)}"
    return spec.for_heads(k[-3], owner)


_AXES = {
    "bhnd": "(*batch, heads, length, features)",
    "bnhd": "(*batch, length, heads, features)",
}


def _divide(query_heads: int, key_heads: int) -> bool:
    return key_heads >= 1 and query_heads >= 1 and query_heads % key_heads == 0


def _other_layout(layout: str, fits: bool) -> str:
    """Return advice to pass the other layout, empty where the shapes do not fit it either."""
    [other] = LAYOUTS.keys() - {layout}
    return f'; if the axes of q, k, v are {_AXES[other]}, pass layout="{other}"' if fits else ""


def _boolean(x: Any, name: str) -> None:
    dtype = dtype_name(x)
    if dtype == "bool":
        return
    true = "where a query may attend to the key" if name == "mask" else "for a real key"
    advice = f"compare it with 0 yourself: {name} != 0"
    if dtype in FLOATS:
        advice = "scores to be added, such as 0 and -inf, go in bias="
    raise TypeError(f"{name}: got dtype {dtype}, expected bool, True {true}; {advice}")


def _broadcastable(x: Any, name: str, q: Any, k: Any, layout: str) -> None:
    def fits(rows: int, heads: int, keys: int) -> bool:
        full = (*q[:-3], heads, rows, keys)
        return len(shape) <= len(full) and all(
            have in (1, want) for have, want in zip(reversed(shape), reversed(full), strict=False)
        )

    shape = tuple(x.shape)
    if not fits(q[-2], q[-3], k[-2]):
        raise ValueError(
            f"{name}: got shape {shape}, expected one that broadcasts to "
            f"{(*q[:-2], q[-2], k[-2])}, which is (*B, Hq, N, M)"
            f"{_other_layout(layout, fits(q[-3], q[-2], k[-3]))}"
        )


def _bias(spec: AttentionSpec, bias: Any, dtype: str) -> None:
    if not spec.kernel.has_log:
        raise UnsupportedError(
            f"bias: {spec.kernel.word} has no log kappa to add it to; use "
            "softmax, gaussian, cosine or polynomial"
        )
    if spec.heads.largest > 1:
        raise UnsupportedError(
            f"bias: {spec} pools keys, and a pooled key has no single bias; use scales of 1"
        )
    if dtype_name(bias) not in ("float32", dtype):
        raise TypeError(f"bias: got dtype {dtype_name(bias)}, expected float32 or {dtype}")


def _offset(offset: Any, lead: tuple[int, ...], library: str) -> None:
    if isinstance(offset, (int, np.integer)) and not isinstance(offset, (bool, np.bool_)):
        return
    if isinstance(offset, str):
        if offset != "end":
            raise ValueError(
                f"offset: got {offset!r}, expected an integer, an integer array () or "
                f"{lead}, or 'end'"
            )
        return
    if not hasattr(offset, "dtype"):
        raise TypeError(
            f"offset: got {type(offset).__name__}, expected an int, an integer array, or 'end'"
        )
    _same_library(offset, "offset", library)
    if not dtype_name(offset).startswith(("int", "uint")):
        raise TypeError(f"offset: got dtype {dtype_name(offset)}, expected an integer dtype")
    if tuple(offset.shape) not in ((), lead):
        raise ValueError(
            f"offset: got shape {tuple(offset.shape)}, expected () or {lead}, one for each sequence"
        )


def _params(
    spec: AttentionSpec, params: Any, sizes: tuple[int, int, int], dtype: str, library: str
) -> None:
    if type(params) is not dict and not isinstance(params, Mapping):  # the fast check first
        raise TypeError(
            f"params: got {type(params).__name__}, expected a mapping of names to arrays"
        )
    declared = {p.name: p for p in spec.parameters()}
    if not declared and not params:
        return
    for name in params:
        if name not in declared:
            raise ValueError(
                f"params: {spec} has no parameter {name!r}; {nearest(str(name), declared)}"
            )
    for name, p in declared.items():
        if name not in params:
            if p.default is None:
                raise ValueError(
                    f"params: {name!r} is missing; {spec} needs it, of shape {_choices(p, *sizes)}"
                )
            continue
        x = params[name]
        _same_library(x, f"params[{name!r}]", library)
        if not any(_equal(x.shape, shape) for shape in _allowed(p, *sizes)):
            raise ValueError(
                f"params[{name!r}]: got shape {tuple(x.shape)}, expected {_choices(p, *sizes)}"
            )
        if dtype_name(x) != dtype and not (dtype_name(x) == "float32" and dtype != "float64"):
            raise TypeError(
                f"params[{name!r}]: got dtype {dtype_name(x)}, expected {dtype}"
                f"{' or float32' if dtype in FLOATS[:2] else ''}"
            )


def _allowed(p: Parameter, heads: int, dim: int, query_heads: int) -> list[tuple[int, ...]]:
    return [parameter_shape(shape, heads, dim, query_heads) for shape in p.shapes]


def _equal(shape: Any, other: tuple[int, ...]) -> bool:
    # One size at a time: `torch.compile` cannot compare tuples of symbolic sizes.
    return len(shape) == len(other) and all(a == b for a, b in zip(shape, other, strict=True))


def parameter_shape(
    shape: tuple[str | int, ...], heads: int, dim: int, query_heads: int | None = None
) -> tuple[int, ...]:
    """Replace the names of sizes in a declared shape by numbers, see `Parameter.shapes`.

    There are as many query heads as key heads, `heads`, where their number is left out.
    """
    sizes: dict[str | int, int | str] = {
        "H": heads,
        "Hq": heads if query_heads is None else query_heads,
        "D": dim,
    }
    return tuple(int(sizes.get(s, s)) for s in shape)


def _choices(p: Parameter, heads: int, dim: int, query_heads: int) -> str:
    return " or ".join(map(str, _allowed(p, heads, dim, query_heads)))


def check_cotangent(x: Any, name: str, like: Any) -> None:
    """Check the library, shape and dtype of a cotangent against those of its result."""
    result = name.removeprefix("d_")
    library = library_of(like, result)
    other = library_of(x, name)
    if other != library:
        raise TypeError(f"{name}: got an array of {other}, expected {library} like {result}")
    check_form(x, name, library, _libraries)
    if tuple(x.shape) != tuple(like.shape):
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected {tuple(like.shape)} like {result}"
        )
    if x.dtype != like.dtype:
        raise TypeError(
            f"{name}: got dtype {dtype_name(x)}, expected {dtype_name(like)} like {result}"
        )


def finite_dropout(dropout: Any) -> float:
    """Check a dropout probability and return it as a float."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout: got {type(dropout).__name__}, expected a float, 0 <= p < 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: got {dropout!r}, expected 0 <= p < 1")
    return float(dropout)


def checked_seed(seed: Any) -> Any:
    """Check a seed of dropout; return an int for what NumPy holds, others as they are."""
    expected = "an int from 0 to 2**64 - 1, an integer array () or (2,), or 'native' on PyTorch"
    if isinstance(seed, (np.ndarray, np.integer)) and seed.dtype.kind in "iu":
        words = [int(word) for word in seed.ravel()]
        if seed.shape == (2,) and seed.dtype == np.uint32:
            seed = words[0] | words[1] << 32
        elif seed.shape == ():
            seed = words[0]
    if isinstance(seed, str):
        if seed != "native":
            raise ValueError(f"seed: got {seed!r}, expected {expected}")
        return seed
    if type(seed) is int:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: got {seed}, expected {expected}")
        return seed
    if isinstance(seed, bool) or not hasattr(seed, "shape"):
        raise TypeError(f"seed: got {type(seed).__name__}, expected {expected}")
    dtype = dtype_name(seed)
    if dtype not in ("int32", "uint32", "int64", "uint64"):
        raise TypeError(
            f"seed: got dtype {dtype}, expected one of int32, uint32, int64, uint64; of a key of "
            "jax.random take jax.random.key_data"
        )
    pair = tuple(seed.shape) == (2,) and dtype == "uint32"
    if tuple(seed.shape) and not pair:
        raise ValueError(f"seed: got {dtype} {tuple(seed.shape)}, expected (), or uint32 (2,)")
    return seed


def group_size(group: Any) -> int:
    """Return the number of ranks of a group of processes, or of a mesh of one dimension."""
    mesh = hasattr(group, "get_group")
    if not (hasattr(group, "size") and (mesh or hasattr(group, "rank"))) or hasattr(group, "dtype"):
        raise TypeError(
            f"group: got {group!r}, expected a ProcessGroup of torch.distributed that this process "
            "is in, or one dimension of a DeviceMesh, such as mesh['sequence']"
        )
    if mesh and group.ndim != 1:
        raise ValueError(
            f"group: got a mesh of {group.ndim} dimensions, expected one; name the dimension along "
            "which the sequence is cut, such as mesh['sequence']"
        )
    return int(group.size())


def refuse_arrays(**options: Any) -> None:
    """Raise a TypeError for an array in the place of an option that is none."""
    for name, value in options.items():
        if getattr(value, "ndim", 0):
            raise TypeError(f"{name}: got {type(value).__name__}, expected no array")
