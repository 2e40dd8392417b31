"""Check a call's arguments against the spec and against each other, before anything runs.

The checks read shapes, dtypes and libraries, never values of arrays: they run at the first call of
each signature only, and while a compiler traces a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays import check_form, dtype_name, library_of
from ..backend import Inputs
from ..errors import UnsupportedError, nearest
from ..plugins import registered
from ..spec import AttentionSpec, Parameter

__all__ = ["validate"]

FLOATS = ("float16", "bfloat16", "float32", "float64")


def validate(spec: AttentionSpec, inputs: Inputs, library: str) -> None:
    """Check shapes, dtypes and libraries.

    Parameters
    ----------
    spec : AttentionSpec
        The attention of the call.
    inputs : Inputs
        The call's arguments.
    library : str
        The library of q.

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
    _shapes(spec, q.shape, k.shape, v.shape)
    lead, heads = tuple(q.shape[:-3]), q.shape[-3]
    full = (*lead, heads, q.shape[-2], k.shape[-2])
    if inputs.key_mask is not None:
        _boolean(inputs.key_mask, "key_mask")
        if tuple(inputs.key_mask.shape) != (*lead, k.shape[-2]):
            expected = (*lead, k.shape[-2])
            raise ValueError(
                f"key_mask: got shape {tuple(inputs.key_mask.shape)}, expected "
                f"{expected}: True for a real key of each sequence"
            )
    if inputs.mask is not None:
        _boolean(inputs.mask, "mask")
        _broadcastable(inputs.mask, "mask", full)
    if inputs.bias is not None:
        _bias(spec, inputs.bias, dtype, full)
    _offset(inputs.offset, lead, library)
    _params(spec, inputs.params, k.shape[-3], q.shape[-1], dtype, library)


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


def _shapes(spec: AttentionSpec, q: Any, k: Any, v: Any) -> None:
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) < 3:
            raise ValueError(
                f"{name}: got shape {tuple(shape)}, expected at least three axes: "
                "(*batch, heads, length, features)"
            )
    if (
        not (len(q) == len(k) == len(v))
        or tuple(k[:-3]) != tuple(q[:-3])
        or tuple(v[:-3]) != tuple(q[:-3])
    ):
        raise ValueError(
            f"q, k, v: got shapes {tuple(q)}, {tuple(k)}, {tuple(v)}, expected the "
            "same leading axes (*batch, heads, length, features)"
        )
    if v[-3] != k[-3] or v[-2] != k[-2]:
        raise ValueError(
            f"v: got shape {tuple(v)}, expected {tuple(k[-3:-1])} heads and keys like k {tuple(k)}"
        )
    if q[-1] != k[-1] or q[-1] < 1:
        raise ValueError(f"k: got {k[-1]} features, expected {q[-1]} like q {tuple(q)}, at least 1")
    if k[-3] < 1 or q[-3] < 1 or q[-3] % k[-3]:
        raise ValueError(
            f"q: got {q[-3]} heads, expected a multiple of the {k[-3]} heads of k, at "
            "least one of each"
        )
    scales = spec.heads.scales
    if scales and len(scales) != k[-3]:
        raise ValueError(
            f"spec: got {len(scales)} scales in {spec}, expected one for each of the "
            f"{k[-3]} heads of k"
        )
    spec.check_keys(k[-2])


def _boolean(x: Any, name: str) -> None:
    if dtype_name(x) != "bool":
        raise TypeError(
            f"{name}: got dtype {dtype_name(x)}, expected bool, True where a key may "
            "be seen (scores to be added go in bias)"
        )


def _broadcastable(x: Any, name: str, full: tuple[int, ...]) -> None:
    shape = tuple(x.shape)
    fits = len(shape) <= len(full) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"{name}: got shape {shape}, expected one that broadcasts to {full}")


def _bias(spec: AttentionSpec, bias: Any, dtype: str, full: tuple[int, ...]) -> None:
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
    _broadcastable(bias, "bias", full)


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
    spec: AttentionSpec, params: Any, heads: int, dim: int, dtype: str, library: str
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
                    f"params: {name!r} is missing; {spec} needs it, of shape "
                    f"{_choices(p, heads, dim)}"
                )
            continue
        x = params[name]
        _same_library(x, f"params[{name!r}]", library)
        if not any(_equal(x.shape, shape) for shape in _allowed(p, heads, dim)):
            raise ValueError(
                f"params[{name!r}]: got shape {tuple(x.shape)}, expected {_choices(p, heads, dim)}"
            )
        if dtype_name(x) != dtype and not (dtype_name(x) == "float32" and dtype != "float64"):
            raise TypeError(
                f"params[{name!r}]: got dtype {dtype_name(x)}, expected {dtype}"
                f"{' or float32' if dtype in FLOATS[:2] else ''}"
            )


def _allowed(p: Parameter, heads: int, dim: int) -> list[tuple[int, ...]]:
    return [parameter_shape(shape, heads, dim) for shape in p.shapes]


def _equal(shape: Any, other: tuple[int, ...]) -> bool:
    # One size at a time: `torch.compile` cannot compare tuples of symbolic sizes.
    return len(shape) == len(other) and all(a == b for a, b in zip(shape, other, strict=True))


def parameter_shape(shape: tuple[str | int, ...], heads: int, dim: int) -> tuple[int, ...]:
    """Replace the names of sizes in a declared shape, "H" and "D", by numbers."""
    sizes: dict[str | int, int | str] = {"H": heads, "D": dim}
    return tuple(int(sizes.get(s, s)) for s in shape)


def _choices(p: Parameter, heads: int, dim: int) -> str:
    return " or ".join(map(str, _allowed(p, heads, dim)))


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
