"""The public calls: `attention`, `bind`, `attention_vjp`, `attention_weights`, `explain`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Never

from .arrays import compiling
from .backend import Inputs
from .dispatch import (
    HEADS_FIRST,
    NO_DROPOUT,
    NO_PARAMS,
    BoundAttention,
    Choice,
    Layout,
    cached_bind,
    explains_arguments,
    heads_first,
    wrong_arguments,
)
from .spec import AttentionSpec

if TYPE_CHECKING:
    from .dispatch import Explanation

__all__ = ["BoundAttention", "attention", "attention_vjp", "attention_weights", "bind", "explain"]


@explains_arguments
def bind(
    spec: str | AttentionSpec = "softmax",
    *extra: Never,
    backend: Choice = None,
    device: str | None = None,
    **unknown: Never,
) -> BoundAttention:
    """Parse a spec and choose the backend once, for many calls.

    Parameters
    ----------
    spec : str or AttentionSpec
        What to compute, such as ``"softmax+bn"``.
    backend : str or sequence of str, optional
        A backend's name, or names to try in order. By default the choice of `use_backend` or
        ``PDCORE_BACKEND`` at this moment, else the built-in backend of the arrays' library.
    device : str, optional
        Move the arrays to this device and the results back; without it, nothing is moved.

    Returns
    -------
    BoundAttention
        A function of q, k, v and the other array arguments of `attention`.

    Examples
    --------
    >>> import numpy as np
    >>> layer = bind("causal")
    >>> x = np.ones((1, 2, 5, 4), dtype=np.float32)
    >>> layer(x, x, x).shape
    (1, 2, 5, 4)
    """
    if extra or unknown:
        raise wrong_arguments(bind, extra, unknown)
    if compiling():
        return cached_bind(spec, backend, device)
    return BoundAttention(spec, backend, device)


@explains_arguments
def attention(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec = "softmax",
    *extra: Never,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    segments: Any = None,
    labels: Any = None,
    params: Mapping[str, Any] | None = None,
    return_lse: bool = False,
    dropout: float = NO_DROPOUT,
    seed: Any = None,
    axis_name: str | None = None,
    group: Any = None,
    backend: Choice = None,
    device: str | None = None,
    layout: Layout = HEADS_FIRST,
    **unknown: Never,
) -> Any:
    """Compute the attention that a spec describes, of arrays (*B, H, N, D).

    For arrays (*B, N, H, D), heads after length, pass ``layout="bnhd"``. The layout is never
    inferred from the shapes: an array in the wrong one runs wherever its shape happens to fit.

    Parameters
    ----------
    q : array (*B, Hq, N, D)
        Queries; float16, bfloat16, float32 or float64.
    k : array (*B, Hkv, M, D)
        Keys; Hq is a multiple of Hkv, and query head i uses key head i // (Hq // Hkv).
    v : array (*B, Hkv, M, Dv)
        Values.
    spec : str or AttentionSpec
        The attention, such as ``"softmax"``, ``"bn+sh(1,1,2,2)"`` or ``"causal+linear"``.
    mask : bool array broadcastable to (*B, Hq, N, M), optional
        True where a query may attend to a key; statistics do not depend on it.
    key_mask : bool array (*B, M), optional
        True for a real key; padding is removed from attention, statistics and pooling.
    bias : array broadcastable to (*B, Hq, N, M), optional
        Added to log kappa; float32 or q's dtype. -inf removes a key.
    offset : int, integer array () or (*B,), or "end"
        The position of query 0; ``"end"`` puts the last query on the last real key.
    segments : integer array (*B, N), or pair of integer arrays (*B, N) and (*B, M), optional
        The ids of the packed sequences that queries and keys belong to, negative for padding;
        see `segments_from_lengths`. Each is computed as a call of its own, with positions, and
        an `offset` for all, that begin with it; only ``batch`` statistics are over all of them.
    labels : integer array (*B, N), or pair of integer arrays (*B, N) and (*B, M), optional
        The labels of queries and keys, for a spec that reads them, such as ``"labels(4)"``.
    params : mapping of str to array, optional
        The arrays that the spec declares, such as ``beta`` for ``bn(beta=param)``.
    return_lse : bool
        Also return log h, by which results over disjoint keys can be merged.
    dropout : float
        The probability p that a weight is dropped, 0 <= p < 1; kept weights are divided by 1 - p.
        Which are dropped depends on the seed alone, see docs/semantics.md, Dropout.
    seed : int, integer array () or (2,), or "native", optional
        The seed of dropout, an int from 0 to 2**64 - 1; an array, which may be traced, has 32 or
        64 bits, or is (2,) with the low 32 bits first. Without it PyTorch draws one from its
        generator; other backends refuse dropout. ``"native"``, on PyTorch, keeps the kernel of
        `scaled_dot_product_attention`, which drops weights by random numbers of its own.
    axis_name : str, optional
        The mapped axis along which the sequence is cut, inside ``jax.shard_map``; the arrays are
        those of one shard. Most backends refuse it.
    group : torch.distributed.ProcessGroup, or DeviceMesh of one dimension, optional
        The processes over which the sequence is cut, in the order of their ranks; the arrays are
        those of this rank, and every rank makes the same call. Only PyTorch takes it.
    backend : str or sequence of str, optional
        A backend by name, which runs the call or raises; or several names, tried in order.
    device : str, optional
        The device to run on; the arrays are moved there and the results back.
    layout : {"bhnd", "bnhd"}
        The order of the axes of q, k, v, out and their gradients: (*B, H, N, D) by default, or
        (*B, N, H, D). Masks, bias, lse and weights have the axes stated here in both.

    Returns
    -------
    out : array (*B, Hq, N, Dv)
        In the inputs' dtype, library, device and layout; zeros for a row that sees no key.
    lse : array (*B, Hq, N)
        Only with `return_lse`; float32, or float64 for float64 inputs.

    Raises
    ------
    TypeError, ValueError
        For a wrong argument.
    UnsupportedError
        For a combination that the spec or the named backend does not support.
    NoBackendError
        When no backend can run the call.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 4, 6, 8), dtype=np.float32)
    >>> attention(q, k, v, "bn+sh(1,1,2,2)").shape
    (1, 4, 6, 8)
    """
    if extra or unknown:
        raise wrong_arguments(attention, extra, unknown)
    return cached_bind(spec, backend, device)(
        q,
        k,
        v,
        mask=mask,
        key_mask=key_mask,
        bias=bias,
        offset=offset,
        segments=segments,
        labels=labels,
        params=params,
        return_lse=return_lse,
        dropout=dropout,
        seed=seed,
        axis_name=axis_name,
        group=group,
        layout=layout,
    )


@explains_arguments
def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec = "softmax",
    *extra: Never,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    segments: Any = None,
    labels: Any = None,
    params: Mapping[str, Any] | None = None,
    dropout: float = NO_DROPOUT,
    seed: Any = None,
    backend: Choice = None,
    device: str | None = None,
    layout: Layout = HEADS_FIRST,
    **unknown: Never,
) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
    """Compute attention and its vector-Jacobian product.

    Parameters
    ----------
    q, k, v, spec, mask, key_mask, bias, offset, segments, labels, params, dropout, \
seed, backend, device, layout
        As in `attention`.

    Returns
    -------
    out : array (*B, Hq, N, Dv)
    lse : array (*B, Hq, N)
    vjp : callable
        ``vjp(d_out, d_lse=None)`` returns the cotangents of ``q``, ``k``, ``v``, of ``bias`` where
        there is one, and of every parameter, by name. Memory is O(N + M) per head, apart from
        the cotangent of a bias, which has the bias's shape.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 2, 5, 4))
    >>> out, lse, vjp = attention_vjp(x, x, x, "bn")
    >>> sorted(vjp(np.ones_like(out)))
    ['k', 'q', 'v']
    """
    if extra or unknown:
        raise wrong_arguments(attention_vjp, extra, unknown)
    params = NO_PARAMS if params is None else params
    given = (mask, key_mask, bias, offset, params, dropout, None, segments, labels, seed)
    inputs = Inputs(q, k, v, *given)
    out, lse, pullback = cached_bind(spec, backend, device).vjp(inputs, layout)
    from .dispatch import check_cotangent

    def vjp(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
        for name, x, like in (("d_out", d_out, out), ("d_lse", d_lse, lse)):
            if x is None and name == "d_lse":
                continue
            check_cotangent(x, name, like)
        return pullback(d_out, d_lse)

    return out, lse, vjp


@explains_arguments
def attention_weights(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec = "softmax",
    *extra: Never,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    segments: Any = None,
    labels: Any = None,
    params: Mapping[str, Any] | None = None,
    backend: Choice = None,
    device: str | None = None,
    layout: Layout = HEADS_FIRST,
    **unknown: Never,
) -> Any:
    """Compute the weights kappa / h, the only public call that builds an (N, M) array.

    Parameters
    ----------
    q, k, v, spec, mask, key_mask, bias, offset, segments, labels, params, backend, device, layout
        As in `attention`.

    Returns
    -------
    array (*B, Hq, N, M)
        The weight of a pooled key is spread evenly over the real keys that it covers
        (with ``pool=first``, all of it is on the first real key).
    """
    if extra or unknown:
        raise wrong_arguments(attention_weights, extra, unknown)
    params = NO_PARAMS if params is None else params
    inputs = Inputs(q, k, v, mask, key_mask, bias, offset, params, segments=segments, labels=labels)
    return cached_bind(spec, backend, device).weights(inputs, layout)


@explains_arguments
def explain(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec = "softmax",
    *extra: Never,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    segments: Any = None,
    labels: Any = None,
    params: Mapping[str, Any] | None = None,
    return_lse: bool = False,
    dropout: float = NO_DROPOUT,
    seed: Any = None,
    axis_name: str | None = None,
    group: Any = None,
    backend: Choice = None,
    device: str | None = None,
    layout: Layout = HEADS_FIRST,
    **unknown: Never,
) -> Explanation:
    """Explain how a call would run: its plan, its backend, and what each other backend refuses.

    Parameters
    ----------
    q, k, v, spec, mask, key_mask, bias, offset, segments, labels, params, return_lse, dropout, \
seed, axis_name, group, backend, device, layout
        As in `attention`.

    Returns
    -------
    Explanation
        Prints as text; ``to_dict()`` returns the same as plain data.
    """
    if extra or unknown:
        raise wrong_arguments(explain, extra, unknown)
    from .dispatch import explain_request

    layer = cached_bind(spec, backend, device)
    params = NO_PARAMS if params is None else params
    given = (mask, key_mask, bias, offset, params, dropout, axis_name, segments, labels, seed)
    inputs = Inputs(q, k, v, *given, group)
    request = layer.request(heads_first(inputs, layout), lse=return_lse, layout=layout)
    return explain_request(request, layer.choice, request.lower())
