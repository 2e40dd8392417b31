"""The arguments of the reference: checked, and cast to the accumulation dtype.

`pdcore.attention` checks its arguments in full. Here only those errors are raised that would
otherwise lead to a wrong result without a message.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from ..spec import AttentionSpec, Kernel, Normalization, as_spec

__all__ = ["ReferenceCall", "hook_params", "positions", "prepare", "select"]


@dataclass(frozen=True)
class ReferenceCall:
    """The arguments of one call, cast to the accumulation dtype; padding may have any values."""

    xp: Any
    spec: AttentionSpec
    dtype: Any
    device: Any
    q: Any
    k: Any
    v: Any
    real: Any  # bool (*B, M)
    mask: Any  # bool (*B, Hq, N, M) or None
    bias: Any  # (*B, Hq, N, M) or None
    position: Any  # integer (N, 1) or (*B, N, 1)
    params: Mapping[str, Any]  # (Hkv, ...) or (Hq, ...) each
    rounded: Callable[[Any], Any]  # rounds to the dtype `round_intermediates`
    labels: Any = None  # integers (*B, N) and (*B, M)


def select(condition: Any, x: Any, y: Any, xp: Any) -> Any:
    """Apply `where`; one of x and y may be a Python float, which takes the other's dtype."""
    if isinstance(x, float):
        x = xp.full_like(y, x)
    if isinstance(y, float):
        y = xp.full_like(x, y)
    return xp.where(condition, x, y)


def prepare(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec,
    mask: Any,
    key_mask: Any,
    bias: Any,
    offset: Any,
    params: Mapping[str, Any] | None,
    round_intermediates: Any,
    packed: bool = False,
    labels: Any = None,
) -> ReferenceCall:
    """Check the arguments, and cast them to the accumulation dtype; `packed`: with segments."""
    from array_api_compat import array_namespace, device

    spec = as_spec(spec)
    params = dict(params or {})
    optional = {"mask": mask, "key_mask": key_mask, "bias": bias, **params}
    arrays = {"q": q, "k": k, "v": v, **{n: x for n, x in optional.items() if x is not None}}
    _check_arrays(arrays)
    offsets = [] if isinstance(offset, str | numbers.Integral) else [offset]
    xp, q_device = array_namespace(*arrays.values(), *offsets), device(q)
    lead, key_heads, dim = _check_shapes(q, k, v)
    fitted = spec.for_heads(key_heads)
    if not packed:
        fitted.check_keys(k.shape[-2])
    rows, length, query_heads = q.shape[-2], k.shape[-2], q.shape[-3]
    full = (*lead, query_heads, rows, length)
    name = _dtype_name(q)
    dtype = xp.float32 if name in ("float16", "bfloat16") else q.dtype

    def accumulated(x: Any) -> Any:
        return xp.astype(x, dtype)

    def rounded(x: Any) -> Any:
        return accumulated(xp.astype(x, round_intermediates))

    q, k, v = accumulated(q), accumulated(k), accumulated(v)
    real = xp.ones((*lead, length), dtype=xp.bool, device=q_device)
    if key_mask is not None:
        _check_key_mask(key_mask, (*lead, length))
        real = key_mask
    if mask is not None:
        if _dtype_name(mask) != "bool":
            raise TypeError(f"mask: got {_dtype_name(mask)}, expected bool")
        mask = xp.broadcast_to(mask, full)
    if bias is not None:
        _check_bias(bias, fitted, name)
        bias = xp.broadcast_to(accumulated(bias), full)
    if labels is not None:
        labels = labels if isinstance(labels, tuple | list) else (labels, labels)
        shapes = [tuple(x.shape) for x in labels]
        if shapes != [(*lead, rows), (*lead, length)]:
            raise ValueError(f"labels: got {shapes}, expected {(*lead, rows)}, {(*lead, length)}")
    elif fitted.by_label:
        raise ValueError(f"labels: {spec} reads them")
    return ReferenceCall(
        xp=xp,
        spec=spec,
        dtype=dtype,
        device=q_device,
        q=q,
        k=k,
        v=v,
        real=real,
        mask=mask,
        bias=bias,
        position=positions(offset, real, rows, key_mask is None, xp, q_device),
        params=_check_params(params, spec, (key_heads, dim, query_heads), dtype, xp, q_device),
        rounded=accumulated if round_intermediates is None else rounded,
        labels=labels,
    )


def _check_arrays(arrays: Mapping[str, Any]) -> None:
    """Check that all arguments are arrays."""
    for name, x in arrays.items():
        if not hasattr(x, "dtype"):
            raise TypeError(f"{name}: got {type(x).__name__}, expected an array")


def _check_key_mask(key_mask: Any, shape: tuple[int, ...]) -> None:
    """Check the dtype and shape of a key mask."""
    if _dtype_name(key_mask) != "bool" or tuple(key_mask.shape) != shape:
        raise ValueError(
            f"key_mask: got {_dtype_name(key_mask)} {tuple(key_mask.shape)}, expected bool {shape}"
        )


def _check_bias(bias: Any, spec: AttentionSpec, dtype: str) -> None:
    """Check the dtype of a bias, and that the spec has a place for it."""
    if _dtype_name(bias) not in ("float32", dtype):
        raise TypeError(f"bias: got {_dtype_name(bias)}, expected float32 or the dtype of q")
    if not spec.kernel.has_log:
        raise UnsupportedError(
            f"bias: it is added to log kappa, and {spec.kernel.word} has no logarithm"
        )
    if spec.heads.largest > 1:
        raise UnsupportedError("bias: it has no meaning for pooled keys (a scale above 1)")


def _check_shapes(q: Any, k: Any, v: Any) -> tuple[tuple[int, ...], int, int]:
    """Check shapes and dtypes; return the leading axes, Hkv and D."""
    shapes = {"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape)}
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3:
            raise ValueError(f"{name}: got shape {shapes[name]}, expected (*B, H, rows, features)")
        if x.dtype != q.dtype or "float" not in _dtype_name(x):
            raise TypeError(f"{name}: got {_dtype_name(x)}, expected one float dtype for q, k, v")
    lead, key_heads = shapes["k"][:-3], shapes["k"][-3]
    if shapes["q"][:-3] != lead or shapes["q"][-1] != shapes["k"][-1]:
        raise ValueError(f"q, k: got shapes {shapes['q']} and {shapes['k']}, which do not fit")
    if shapes["v"][:-1] != shapes["k"][:-1]:
        raise ValueError(f"v: got shape {shapes['v']}, expected {(*shapes['k'][:-1], 'Dv')}")
    if key_heads == 0 or shapes["q"][-3] == 0 or shapes["q"][-3] % key_heads:
        raise ValueError(
            f"q: got {shapes['q'][-3]} heads, expected a multiple of the {key_heads} of k"
        )
    return lead, key_heads, shapes["k"][-1]


def positions(offset: Any, real: Any, rows: int, unmasked: bool, xp: Any, q_device: Any) -> Any:
    """Return the positions of the queries, integers (N, 1) or (*B, N, 1)."""
    row = xp.arange(rows, device=q_device)
    lead, length = tuple(real.shape[:-1]), real.shape[-1]
    if isinstance(offset, str) and offset == "end":
        if unmasked:
            offset = length - rows
        else:
            index = xp.broadcast_to(xp.arange(length, device=q_device), real.shape)
            index = xp.where(real, index, xp.full_like(index, -1))
            none = xp.full((*lead, 1), -1, dtype=index.dtype, device=q_device)
            offset = xp.max(xp.concat([index, none], axis=-1), axis=-1) - (rows - 1)
    elif not isinstance(offset, bool) and isinstance(offset, numbers.Integral):
        offset = int(offset)
    elif "int" not in _dtype_name(offset) or tuple(getattr(offset, "shape", ())) not in ((), lead):
        raise ValueError(
            f"offset: got {offset!r}, expected an int, integers of shape () or {lead}, or 'end'"
        )
    if isinstance(offset, int):
        return row[:, None] + offset
    return row[:, None] + xp.astype(offset, row.dtype)[..., None, None]


def _check_params(
    params: dict[str, Any],
    spec: AttentionSpec,
    sizes: tuple[int, int, int],
    dtype: Any,
    xp: Any,
    q_device: Any,
) -> dict[str, Any]:
    """Check params against the declarations of the spec, and fill in the defaults."""
    declared = {p.name: p for p in spec.parameters()}
    for name in params:
        if name not in declared:
            raise ValueError(f"params: unknown name {name!r}; {spec} takes {sorted(declared)}")
    checked = {}
    for name, p in declared.items():
        shapes = [_resolve(shape, *sizes) for shape in p.shapes]
        if name in params:
            if tuple(params[name].shape) not in shapes:
                raise ValueError(
                    f"params: {name!r} has shape {tuple(params[name].shape)}, expected one of "
                    f"{shapes}"
                )
            checked[name] = xp.astype(params[name], dtype)
        elif p.default is None:
            raise ValueError(f"params: {name!r} is missing; {spec} needs it")
        else:
            checked[name] = p.filled(shapes[0], xp=xp, dtype=dtype, device=q_device)
    return checked


def hook_params(
    owner: Kernel | Normalization, call: ReferenceCall, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Reshape the parameters of one head as `features` and `apply` expect them."""
    dim, shaped = call.q.shape[-1], {}
    for p in owner.parameters():
        value = params[p.name]
        fitting = [s for s in p.shapes if _resolve(s, 1, dim) == tuple(value.shape)]
        if ("H",) in fitting:
            value = call.xp.reshape(value, (1, 1, 1))
        elif ("H", "D") in fitting:
            value = call.xp.reshape(value, (1, 1, dim))
        shaped[p.name] = value
    return shaped


def _resolve(
    shape: tuple[str | int, ...], heads: int, dim: int, query_heads: int = 1
) -> tuple[int, ...]:
    sizes = {"H": heads, "D": dim, "Hq": query_heads}
    return tuple(sizes[n] if isinstance(n, str) else n for n in shape)


def _dtype_name(x: Any) -> str:
    """Return the name of a dtype, such as ``float16`` or ``bool``, the same in every library."""
    return str(getattr(x, "dtype", None)).rpartition(".")[2]
