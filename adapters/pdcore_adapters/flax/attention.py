"""`attention_fn`, the function that the attention layers of Flax call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax.nnx.nn.dtypes import promote_dtype as flax_promotion
from jax import numpy as jnp

from pdcore import AttentionSpec, Decoder, UnsupportedError
from pdcore.extend import Inputs

from ..bound import BoundSpec, Choice, Drop, check_drop, refuse_dropout
from ..jax_seed import seed_of
from ..watching import tell
from .arguments import check_precision, refuse_products, sow

__all__ = ["Attention", "PackedMask", "attention_fn"]


def attention_fn(
    spec: str | AttentionSpec = "softmax",
    *,
    backend: Choice = None,
    padding: bool = False,
    drop: Drop = "weights",
) -> Callable[..., Any]:
    """Build the `attention_fn` of `flax.nnx.MultiHeadAttention` and of Linen's attention layers.

    Parameters
    ----------
    spec : str or AttentionSpec
        The attention of the heads; head scaling has one scale for each key head, or ``half=``.
    backend : str or sequence of str, optional
        As in `pdcore.bind`; the choice is made by this call.
    padding : bool
        Whether masks hide padding only: each query of a sequence sees the same keys, or none. Any
        other mask is then an error; under `jax.jit`, the results of its sequence are NaN.
    drop : {"weights", "output"}
        What the dropout of the layer drops: weights, or outputs of the heads, for a feature map,
        such as ``linear``, which has no weights.

    Returns
    -------
    callable
        A function with the arguments of `flax.nnx.dot_product_attention` and
        `flax.linen.dot_product_attention`. Functions built from equal arguments are equal.

    Raises
    ------
    SpecError
        For a spec that is wrong.
    UnsupportedError
        For a spec with arrays as parameters, such as ``bn(beta=param)``, ``iebn`` or
        ``bn(statistics=running)``: `SpecAttention` and `LinenSpecAttention` keep them.

    Notes
    -----
    For specs with statistics, pooled keys, ``causal`` or windows it matters which keys are real and
    at which positions the queries are. Both follow from the mask and the lengths:

    - a key that no query sees is padding, or an unwritten entry of a cache, and is excluded from
      attention, statistics and pooling;
    - if there are as many queries as keys, the queries have the positions of the keys;
    - one query with several keys is a step of decoding: its position is that of the last key that
      it sees. Specs that depend on positions refuse other lengths.

    A mask with a row for each query, (*B, H or 1, N, M), may be causal. Specs with statistics of
    the sequence, which would then depend on the future, and specs that pool keys without being
    causal, refuse such a mask unless `padding` is True. They accept one row for all queries,
    (*B, H or 1, 1, M). If ``causal`` is in the spec, a causal mask is unnecessary, but allowed.

    Packed sequences are the argument `segments`, or `PackedMask` in place of a mask. The rules then
    hold in each segment.
    """
    bound = BoundSpec(spec, backend)
    if needed := [p.name for p in bound.spec.parameters() if not callable(p.default)]:
        names = ", ".join(needed)
        raise UnsupportedError(
            f"spec: {bound.spec} takes the arrays {names}, and a function has no place for them; "
            "use SpecAttention, or LinenSpecAttention in Linen, as the attention_fn"
        )
    return Attention(bound, padding, drop)


class PackedMask(NamedTuple):
    """Ids of packed sequences, and labels, in place of the `mask` of a layer of Flax.

    The layers pass on nothing but a mask, which this is for `attention_fn` and `SpecAttention`.

    Attributes
    ----------
    segments : integer array (*B, N), or a pair, (*B, N) and (*B, M), optional
        As in `pdcore.attention`: ids of the segments of queries and keys, negative for padding.
    mask : array broadcastable to (*B, H, N, M), optional
        The mask within the segments.
    labels : integer array (*B, N), or a pair, (*B, N) and (*B, M), optional
        As in `pdcore.attention`: the labels of queries and keys.

    Examples
    --------
    >>> import pdcore
    >>> ids = pdcore.segments_from_lengths([6, 3], total=10)[None]
    >>> attend = attention_fn("bn")
    >>> layer = nnx.MultiHeadAttention(4, 16, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 16)), mask=PackedMask(ids)).shape
    (1, 10, 16)
    """

    segments: Any = None
    mask: Any = None
    labels: Any = None


class _Keys(NamedTuple):
    """The arguments of `pdcore.attention` that follow from a mask and the lengths."""

    mask: Any
    key_mask: Any
    offset: int | str
    #: True for sequences (*B,) with a mask other than padding; None where this was checked.
    invalid: Any


class Attention:
    """The function that a layer of Flax calls, for one spec."""

    __slots__ = (
        "__weakref__",
        "_bound",
        "_by_position",
        "_drop",
        "_needs_keys",
        "_padding",
        "_strict",
    )

    def __init__(self, bound: BoundSpec, padding: bool, drop: Drop = "weights") -> None:
        check_drop(drop)
        self._bound = bound
        self._padding = padding
        self._drop: Drop = drop
        spec = self.spec
        pools, training = spec.heads.largest > 1, spec.normalization.training
        self._needs_keys = pools or training.statistics_state() is not None
        self._by_position = spec.support.restricts or spec.prefix
        #: Whether the spec refuses masks that may be causal.
        self._strict = spec.support.ahead != 0 and (pools or spec.normalization.leaks)

    @property
    def spec(self) -> AttentionSpec:
        """The attention of the heads."""
        return self._bound.spec

    def decoder(self, dtype: Any, kept: Any = None) -> Decoder:
        """Return the decoder of the spec, for queries of a dtype; `kept` as in a call."""
        return self._bound.decoder({} if kept is None else kept.params(self.spec, dtype))

    def __repr__(self) -> str:
        more = ", padding=True" if self._padding else ""
        more += f", drop={self._drop!r}" if self._drop != "weights" else ""
        return f"<pdcore attention_fn({str(self.spec)!r}{more})>"

    def _identity(self) -> tuple[BoundSpec, bool, Drop]:
        return self._bound, self._padding, self._drop

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attention) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __reduce__(self) -> tuple[Any, ...]:
        return Attention, self._identity()

    # Linen passes only the arguments that are named in this signature, and silently drops others.
    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        segments: Any = None,
        labels: Any = None,
        kept: Any = None,
    ) -> Any:
        """Attend, as `flax.nnx.dot_product_attention` and `flax.linen.dot_product_attention` do.

        Parameters
        ----------
        query : array (*B, N, H, D)
        key : array (*B, M, Hkv, D)
        value : array (*B, M, Hkv, Dv)
        bias : array broadcastable to (*B, H, N, M), optional
            Added to log kappa; -inf removes a key, but it stays in statistics.
        mask : array broadcastable to (*B, H, N, M), or PackedMask, optional
            Of any dtype; a query may attend to a key where it is not zero.
        broadcast_dropout : bool
            No effect: weights are dropped one by one.
        dropout_rng : PRNG key, optional
            The key of dropout, of which 64 bits are the seed. Required by it.
        dropout_rate : float
            The probability that a weight, or an output, is dropped in training. For weights of a
            feature map, such as ``linear``, which has none, refused above 0.
        deterministic : bool
            True outside training.
        dtype : dtype, optional
            The dtype of the computation, to which query, key and value are cast.
        precision : optional
            A `jax.lax.Precision` or one of its names: the least precision of products. Products
            always have the full precision of their dtype.
        module : flax.nnx.Module or flax.linen.Module, optional
            The module into which the weights, (*B, H, N, M), are sown as ``attention_weights``.
        promote_dtype : callable, optional
            As in `flax.nnx.dot_product_attention`.
        is_causal : bool
            Whether to add ``causal`` to the spec.
        force_fp32_for_softmax : bool
            Refused for float64; no effect for 16- and 32-bit inputs, computed in float32 anyway.
        einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum : optional
            Refused, since the scores are not computed by one product.
        segments : integer array (*B, N), or a pair, (*B, N) and (*B, M), optional
            Ids of the packed sequences of queries and keys, negative for padding, as in
            `pdcore.attention`.
        labels : integer array (*B, N), or a pair, (*B, N) and (*B, M), optional
            The labels of queries and keys, for a spec such as ``labels(4)``.
        kept : KeptArrays, optional
            The arrays of the layer that the spec takes, and what the call's keys update.

        Returns
        -------
        array (*B, N, H, Dv)

        Raises
        ------
        TypeError, ValueError, UnsupportedError
            For a wrong argument; the message names it.
        """
        refuse_products(
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        check_precision(precision)
        if self._drop == "weights":
            refuse_dropout(self.spec, "dropout_rate", dropout_rate, _NO_WEIGHTS)
        for name, x in (("query", query), ("key", key), ("value", value)):
            if jnp.ndim(x) < 3:
                raise ValueError(
                    f"{name}: got shape {jnp.shape(x)}, expected (*batch, length, heads, features)"
                )
        promote = flax_promotion if promote_dtype is None else promote_dtype
        query, key, value = promote((query, key, value), dtype=dtype)
        if force_fp32_for_softmax and query.dtype == jnp.float64:
            raise UnsupportedError(
                "force_fp32_for_softmax: got True for float64 inputs, which are computed in "
                "float64 throughout; leave it out, or cast the inputs to float32"
            )
        q, k, v = (jnp.asarray(x) for x in (query, key, value))
        attend = self._bound.attention
        if is_causal:
            if self._bound.causal_refusal:
                raise UnsupportedError(f"is_causal: {self._bound.causal_refusal}")
            attend = self._bound.causal
        if isinstance(mask, PackedMask):
            for name, x in (("segments", segments), ("labels", labels)):
                if x is not None:
                    raise TypeError(
                        f"mask: got a PackedMask beside {name}=, expected one of the two"
                    )
            segments, mask, labels = mask
        keys = self._keys(q, k, mask, bias, is_causal, segments)
        masks = {"mask": keys.mask, "key_mask": keys.key_mask, "bias": bias, "offset": keys.offset}
        masks |= {"segments": segments, "labels": labels}
        params = {} if kept is None else kept.params(attend.spec, q.dtype)
        if module is not None:
            sow(module, attend.weights(Inputs(q, k, v, **masks, params=params), "bnhd"))
        dropped = not deterministic and dropout_rate > 0.0
        if dropped:
            if dropout_rng is None:
                raise ValueError(
                    f"dropout_rng: got None with dropout_rate {dropout_rate}, expected a PRNG key: "
                    "give the layer rngs with a stream named dropout"
                )
            if self._drop == "weights":
                masks |= {"dropout": dropout_rate, "seed": seed_of(dropout_rng)}
        out = attend(q, k, v, **masks, params=params, layout="bnhd")
        tell(self, attend, Inputs(q, k, v, **masks, params=params), out, "bnhd")
        if dropped and self._drop == "output":
            left = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, out.shape)
            out = jnp.where(left, out / (1.0 - dropout_rate), 0.0)
        if kept is not None:
            kept.track(k, keys.key_mask, segments)
        if keys.invalid is not None:
            out = jnp.where(keys.invalid[..., None, None, None], jnp.nan, out)
        return out

    def _keys(self, q: Any, k: Any, mask: Any, bias: Any, is_causal: bool, segments: Any) -> _Keys:
        """Interpret the mask of a call."""
        *lead, n, heads, _ = q.shape
        m = k.shape[-3]
        strict = self._strict and not is_causal
        if strict and bias is not None and _rows(bias) > 1:
            raise UnsupportedError(
                f"bias: got shape {jnp.shape(bias)}, and a bias with a row for each query may "
                f"hide the future, which {self.spec} would see; expected (..., 1, {m}), or permit "
                "it with bn(allow_leak=true)"
            )
        by_position = self._by_position or is_causal
        decoding = by_position and n == 1 < m
        if by_position and n != m and (n != 1 or mask is None):
            raise UnsupportedError(
                f"query: got {n} queries for {m} keys{'' if n > 1 else ' without a mask'}, and "
                f"{self.spec}{' with is_causal' if is_causal else ''} goes by position; expected "
                "as many as keys, or one with a mask of the keys before it, as in decoding"
            )
        if mask is None:
            return _Keys(None, None, 0, None)
        mask = jnp.asarray(mask) != 0
        if mask.ndim > q.ndim:
            raise ValueError(
                f"mask: got shape {mask.shape}, expected one that broadcasts to "
                f"{(*lead, heads, n, m)}"
            )
        full = jnp.reshape(mask, (1,) * (q.ndim - mask.ndim) + mask.shape)
        if strict and full.shape[-2] > 1 and not self._padding:
            raise UnsupportedError(
                f"mask: got shape {mask.shape}, and a mask with a row for each query may be "
                f"causal, where {self.spec} would see the future; put causal in the spec (bn is "
                f"causal+bn(statistics=prefix) there), give a mask (..., 1, {m}) of the real "
                "keys, or say attention_fn(padding=True)"
            )
        together = True if segments is None else _together(segments)
        key_mask = jnp.any(full & together, (-3, -2))
        invalid = _not_padding(full, key_mask, together) if self._padding else None
        if not (self._needs_keys or decoding):
            return _Keys(mask, None, 0, invalid)
        key_mask = jnp.broadcast_to(key_mask, (*lead, m))
        one_row = full.shape[-2] == full.shape[-3] == 1
        return _Keys(None if one_row else mask, key_mask, "end" if decoding else 0, invalid)


_NO_WEIGHTS = (
    "dropout_rate=0.0 to the layer, or attention_fn(drop='output'), which drops outputs of the "
    "heads in their place"
)


def _together(segments: Any) -> Any:
    """Return which queries and keys are of one segment, (*B, 1, N, M)."""
    pair = isinstance(segments, tuple | list)
    q, k = (jnp.asarray(x) for x in (segments if pair else (segments, segments)))
    return (q[..., None, :, None] == k[..., None, None, :]) & (q >= 0)[..., None, :, None]


def _not_padding(mask: Any, key_mask: Any, together: Any) -> Any:
    """Return the sequences (*B,) whose queries see different keys; raise unless it is traced."""
    seen = mask & together
    same = jnp.all(seen == (key_mask[..., None, None, :] & together), -1) | ~jnp.any(seen, -1)
    invalid = ~jnp.all(same, (-2, -1))
    if isinstance(invalid, jax.core.Tracer):
        return invalid
    if invalid.any():
        raise ValueError(
            "mask: queries of one sequence see other keys than one another, and "
            "attention_fn(padding=True) says that masks hide padding only; put causal or a window "
            "in the spec"
        )
    return None


def _rows(x: Any) -> int:
    """Return the length of the query axis of a mask or bias."""
    shape = jnp.shape(x)
    return int(shape[-2]) if len(shape) > 1 else 1
