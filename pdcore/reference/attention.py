"""The oracle: the specification computed by its formulas, which every backend is tested against.

The formulas are written as array-API calls, one head at a time, with (N, M) arrays and without
rewrites: the normalization is not folded into the query, and there are no blocks and no prefix
sums. The code runs on any array library, also in ``numpy.longdouble``, and can be differentiated
by a framework: it has no in-place writes and no branches on values of arrays, and both branches of
a `where` are finite wherever a gradient could otherwise be NaN. It is not meant to be fast.

Notation: B leading axes, N queries, M keys, W keys after pooling, D and Dv features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import UnsupportedError
from ..spec import Alibi, AttentionSpec, Labels, Relative, Term
from .dropout import keeps
from .inputs import ReferenceCall, prepare, select
from .kernels import entry, kappa_of, pointwise
from .normalizations import prefix_inner_products, transform_of
from .pooling import pool, pooled_keys, windows
from .segments import over_segments

__all__ = ["reference_attention", "reference_weights"]

INF = math.inf


def reference_attention(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec = "softmax",
    *,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    segments: Any = None,
    labels: Any = None,
    params: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    return_lse: bool = False,
    round_intermediates: Any = None,
) -> Any:
    """Compute an attention by its formulas: f(x) = sum_j v_j kappa(x, k_j) / h(x).

    A NaN or inf reaches exactly the rows that depend on it: directly, through a pooled key, or
    through a statistic. 16-bit inputs are converted to float32, and the result is rounded once, at
    the end. Gradients by automatic differentiation are never NaN for finite inputs. The running
    `mean` and `var` are differentiated too, since the array API has no way to detach them. The
    precision of matrix products is that of the library's settings.

    Parameters
    ----------
    q : array (*B, Hq, N, D)
        Queries, float16, bfloat16, float32, float64 or NumPy's longdouble.
    k : array (*B, Hkv, M, D)
        Keys; query head i uses key head ``i // (Hq // Hkv)``.
    v : array (*B, Hkv, M, Dv)
        Values.
    spec : str or AttentionSpec
        What to compute.
    mask : bool array broadcastable to (*B, Hq, N, M), optional
        True where a query may attend to a key; a pooled key needs it for all its real keys.
    key_mask : bool array (*B, M), optional
        True for a real key.
    bias : float array broadcastable to (*B, Hq, N, M), optional
        Added to log kappa; -inf removes the key, from ``h(count)`` too.
    offset : int, integer array () or (*B,), or "end"
        The position of query 0; with ``"end"``, the last query is at the last real key.
    segments : integer array (*B, N), or pair of integer arrays (*B, N) and (*B, M), optional
        The ids of the segments of queries and keys, negative for padding; each segment is a call
        of its own, but for ``batch`` statistics.
    labels : integer array (*B, N), or pair of integer arrays (*B, N) and (*B, M), optional
        The labels of queries and keys, for specs that read them.
    params : mapping of str to array, optional
        The arrays that the spec's kernel and normalization declare.
    dropout : float
        The probability that a weight is dropped; not with segments.
    seed : int
        The seed of dropout, from 0 to 2^64 - 1.
    return_lse : bool
        Return log h too.
    round_intermediates : dtype, optional
        A 16-bit dtype of the arrays' library, to which T(q), T(k), the weights kappa / h and the
        result are rounded, while sums are in float32. The error of the result is then that of a
        careful 16-bit implementation.

    Returns
    -------
    out : array (*B, Hq, N, Dv)
        In the dtype of `q`. A row without a visible key is zero.
    lse : array (*B, Hq, N)
        With `return_lse`: log h, which is log sum kappa (with the sink), log n or 0 for h = sum,
        count or one; -inf in a row that sees no key, and for sum in a row whose kernel values are
        all 0, but for a sink. float32 for 16-bit inputs.

    Raises
    ------
    TypeError, ValueError
        When the arguments do not fit each other or the spec.
    UnsupportedError
        For a bias with pooled keys, or with a kernel that has no logarithm.

    Examples
    --------
    >>> import numpy as np
    >>> q, k = np.zeros((1, 1, 3)), np.zeros((1, 2, 3))  # kappa = 1 for both keys
    >>> v = np.asarray([[[1.0], [3.0]]])
    >>> print(reference_attention(q, k, v))
    [[[2.]]]
    """
    # Only NumPy warns: of overflow, of log 0, and of a NaN in the inputs.
    with np.errstate(all="ignore"):
        masks, rounded = (mask, key_mask, bias), round_intermediates
        packed = segments is not None
        call = prepare(q, k, v, spec, *masks, offset, params, rounded, packed, labels)
        if packed and dropout:
            raise UnsupportedError("dropout: not with segments")
        attend = partial(_attend, dropout=(dropout, seed))
        results = over_segments(call, segments, offset, attend) if packed else attend(call)
        out = call.xp.astype(call.rounded(results[0]), q.dtype)
        return (out, results[1]) if return_lse else out


def reference_weights(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec = "softmax",
    *,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    segments: Any = None,
    labels: Any = None,
    params: Mapping[str, Any] | None = None,
    round_intermediates: Any = None,
) -> Any:
    """Compute the weights kappa / h of an attention over the keys before pooling.

    Parameters
    ----------
    q, k, v, spec, mask, key_mask, bias, offset, segments, labels, params, round_intermediates
        As in `reference_attention`.

    Returns
    -------
    array (*B, Hq, N, M)
        In the dtype of `q`. The weight of a pooled key is spread evenly over the real keys that
        it covers (with ``pool=first``, it is on the first of them), so that ``weights @ v`` is the
        attention.

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        As in `reference_attention`.
    """
    with np.errstate(all="ignore"):
        masks, rounded = (mask, key_mask, bias), round_intermediates
        packed = segments is not None
        call = prepare(q, k, v, spec, *masks, offset, params, rounded, packed, labels)
        if packed:
            [weights] = over_segments(call, segments, offset, _spread, at_keys=True)
        else:
            [weights] = _spread(call)
        return call.xp.astype(weights, q.dtype)


def _attend(call: ReferenceCall, *, dropout: tuple[float, int]) -> tuple[Any, Any]:
    """Compute out (*B, Hq, N, Dv) and lse (*B, Hq, N)."""
    xp, outs, lses = call.xp, [], []
    for i, head in enumerate(_heads(call)):
        weights = _dropped(call, i, head, *dropout) if dropout[0] else head.weights
        outs.append(_contract(weights, head.visible, head.values, xp))
        lses.append(head.lse)
    return xp.stack(outs, axis=-3), xp.stack(lses, axis=-2)


def _dropped(call: ReferenceCall, i: int, head: _Head, p: float, seed: int) -> Any:
    """Return the weights of query head i with some set to 0, and the others over 1 - p."""
    xp, (*lead, heads, rows, _) = call.xp, call.q.shape
    *_, windows, scale = head.pooled.shape
    index = heads * np.arange(math.prod(lead)).reshape(lead) + i
    kept = xp.asarray(keeps(p, seed, index, rows, scale * np.arange(windows)))
    return select(kept, head.weights / (1.0 - p), 0.0, xp)


def _spread(call: ReferenceCall) -> tuple[Any]:
    """Compute the weights of the keys before pooling, (*B, Hq, N, M)."""
    xp, spread = call.xp, []
    for head in _heads(call):
        pooled = head.pooled[..., None, :, :]
        count = xp.sum(xp.astype(pooled, call.dtype), axis=-1, keepdims=True)
        share = head.weights[..., None] / select(count > 0, count, 1.0, xp)
        share = select(pooled, share, 0.0, xp)
        *lead, count, scale = share.shape
        spread.append(xp.reshape(share, (*lead, count * scale))[..., : call.k.shape[-2]])
    return (xp.stack(spread, axis=-3),)


@dataclass(frozen=True)
class _Head:
    """The weights of one query head over the pooled keys, and the values that they weigh."""

    weights: Any  # (*B, N, W), 0 where not visible
    visible: Any  # bool (*B, N, W)
    lse: Any  # (*B, N)
    values: Any  # pooled, (*B, W, Dv)
    pooled: Any  # bool (*B, W, s): the keys of a window that its pooled key is the mean of


def _heads(call: ReferenceCall) -> Iterator[_Head]:
    """Yield the query heads in order."""
    xp, spec = call.xp, call.spec
    key_heads = call.k.shape[-3]
    group = call.q.shape[-3] // key_heads
    by_key_head = [p.name for p in spec.parameters() if not p.by_query_head]
    by_query_head = [p.name for p in spec.parameters() if p.by_query_head]
    for g in range(key_heads):
        keys, in_window, pooled = pooled_keys(call, g)
        scale = pooled.shape[-1]
        values = pool(call.v[..., g, :, :], pooled, call)
        real = xp.any(in_window, axis=-1)
        params = {name: call.params[name][g : g + 1, ...] for name in by_key_head}
        # A pooled key occupies its whole window, even where the last keys do not exist.
        first = xp.arange(real.shape[-1], device=call.device) * scale
        allowed = _allowed_by_position(call, first, first + (scale - 1))
        allowed = allowed & real[..., None, :]
        # The keys of prefix statistics, which mask and window do not restrict.
        counted = (first + (scale - 1) <= call.position) & real[..., None, :]
        transform, y = (None, keys) if spec.prefix else transform_of(call, keys, real, params)
        y = y if transform is None else call.rounded(y)
        for i in range(g * group, (g + 1) * group):
            visible = allowed
            if call.mask is not None:
                mask = windows(xp.matrix_transpose(call.mask[..., i, :, :]), scale, call)
                denied = xp.any(~mask & in_window[..., None], axis=-2)
                visible = visible & ~xp.matrix_transpose(denied)
            bias = None
            if call.bias is not None:
                bias = call.bias[..., i, :, :]
                visible = visible & (bias != -INF)
            query = call.q[..., i, :, :]
            units: tuple[Any, ...] = ()
            for name in by_query_head:
                x = call.params[name]
                params[name] = x[i : i + 1, ...] if x.shape[0] > 1 else x
            places = _places(call, first)
            if transform is None:
                visible = visible & xp.any(counted, axis=-1, keepdims=True)
                inner = prefix_inner_products(call, query, keys, counted, params)
                has_log, kappa = True, pointwise(spec.kernel, inner, visible, call, params, places)
            else:
                x = call.rounded(transform(query))
                has_log, kappa, units = kappa_of(spec.kernel, x, y, visible, call, params, places)
            if bias is not None:
                kappa = kappa + bias
            for term in spec.terms:
                added = _of_places(term, places, params, xp)
                visible = visible & (added != -INF)
                kappa = kappa + added
            sink = call.params["sink"][i, ...] if spec.sink == "param" else spec.sink
            weights, lse = _normalise(kappa, has_log, units, visible, spec.normaliser, sink, xp)
            yield _Head(call.rounded(weights), visible, lse, values, pooled)


def _places(call: ReferenceCall, first: Any) -> dict[str, Any]:
    """Return p_j - p_i and the labels of queries and keys, each broadcastable to (*B, N, M)."""
    places = {"distance": first - call.position}
    if call.labels is not None:
        of_queries, of_keys = call.labels
        places["query_label"] = of_queries[..., :, None]
        places["key_label"] = of_keys[..., None, :]
    return {name: call.xp.astype(x, call.dtype) for name, x in places.items()}


def _of_places(term: Term, places: Mapping[str, Any], params: Mapping[str, Any], xp: Any) -> Any:
    """Return a term of log kappa by positions or labels, (N, M) or (*B, N, M)."""
    if isinstance(term, Alibi):
        return -params["slopes"][0, ...] * xp.abs(places["distance"])
    if isinstance(term, Relative):
        apart = xp.clip(places["distance"], -float(term.reach), float(term.reach))
        return entry(params["relative"], (apart + float(term.reach),), xp)
    if isinstance(term, Labels):
        return entry(params["influence"], (places["query_label"], places["key_label"]), xp)
    raise UnsupportedError(f"{term.word}: the reference has no formula for it")


def _allowed_by_position(call: ReferenceCall, first: Any, last: Any) -> Any:
    """Return which keys causal and window allow: those whose span first..last is all allowed."""
    position, support = call.position, call.spec.support
    shape = (*position.shape[:-1], first.shape[0])
    allowed = call.xp.ones(shape, dtype=call.xp.bool, device=call.device)
    if support.causal:
        allowed = allowed & (last <= position)
    if support.left != INF:
        allowed = allowed & (first >= position - int(support.left))
    if support.right != INF:
        allowed = allowed & (last <= position + int(support.right))
    return allowed


# --- normaliser and contraction ---------------------------------------------------------------


def _normalise(
    kappa: Any,
    has_log: bool,
    units: tuple[Any, ...],
    visible: Any,
    normaliser: str,
    sink: Any,
    xp: Any,
) -> tuple[Any, Any]:
    """Divide kappa by h; with `has_log`, `kappa` is the logarithm of kappa.

    The units of kappa, see `kappa_of`, cancel where h is the sum of kappa. A sink, a number, an
    array () or None, is one more logarithm in that sum, and has no weight.

    Returns
    -------
    weights : array (*B, N, W)
        0 where not visible, and in rows where h is 0.
    lse : array (*B, N)
        log h.
    """
    seen = xp.sum(xp.astype(visible, kappa.dtype), axis=-1, keepdims=True)
    last = -INF if sink is None else sink
    sinks = xp.full_like(seen, last) if isinstance(last, float) else last + 0.0 * seen
    top, used = xp.zeros_like(seen), visible
    if has_log:
        used = visible & (kappa != -INF)
        if normaliser == "sum":
            # The maximum of a row without keys is -inf, by the column that is added.
            logs = [select(used, kappa, -INF, xp), sinks]
            top = xp.max(xp.concat(logs, axis=-1), axis=-1, keepdims=True)
            top = select(top == -INF, 0.0, top, xp)
        kappa = xp.exp(xp.where(used, kappa, top) - top)
    kappa = select(used, kappa, 0.0, xp)
    for unit in units:
        if normaliser == "sum":
            top = top + xp.log(unit)
        else:
            kappa = kappa * unit
    if normaliser == "sum":
        h = xp.sum(kappa, axis=-1, keepdims=True)
        h = h if sink is None else h + xp.exp(sinks - top)
    else:
        h = seen if normaliser == "count" else select(seen == 0, 0.0, xp.ones_like(seen), xp)
    zero = h == 0
    h = select(zero, 1.0, h, xp)
    lse = select(zero, -INF, top + xp.log(h), xp)
    return select(used & ~zero, kappa / h, 0.0, xp), lse[..., 0]


def _contract(weights: Any, visible: Any, values: Any, xp: Any) -> Any:
    """Compute weights @ values so that a row does not depend on values that it does not see.

    Since 0 times NaN or inf is NaN, values that are not finite are left out of the product. What
    they add to the rows that see them is found by counting: inf or -inf where all have that sign,
    and NaN where signs differ, a value is NaN, or its weight is 0.
    """
    finite = xp.isfinite(values)
    out = xp.matmul(weights, select(finite, values, 0.0, xp))
    # float32, in which the counts are exact, also for 16-bit values.
    seen = xp.matmul(xp.astype(visible, xp.float32), xp.astype(~finite, xp.float32))
    net = xp.matmul(_sign(weights, xp), _sign(select(finite, 0.0, values, xp), xp))
    addend = select(net == -seen, -INF, xp.full_like(out, math.nan), xp)
    addend = select(net == seen, INF, addend, xp)
    return out + select(seen == 0, 0.0, addend, xp)


def _sign(x: Any, xp: Any) -> Any:
    return xp.astype(x > 0, xp.float32) - xp.astype(x < 0, xp.float32)
