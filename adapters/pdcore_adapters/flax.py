"""pdcore attention in the attention layers of Flax, NNX and Linen.

>>> from flax import nnx
>>> attend = attention_fn("bn+sh(1,1,2,2)")
>>> layer = nnx.MultiHeadAttention(4, 16, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
>>> layer(jax.numpy.ones((2, 10, 16))).shape
(2, 10, 16)

Flax hands its attention one mask. Padding, a causal pattern and the entries of a cache that are
not written yet are all in it, and statistics have to tell them apart. This module reads a mask by
its shape, and refuses to guess where the shape does not say enough; `attention_fn` lists how.

Notation: *B leading axes, H query heads, Hkv key heads, N queries, M keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen, nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promotion
from jax import numpy as jnp

from pdcore import AttentionSpec, UnsupportedError
from pdcore.extend import Inputs

from .bound import Bound, Choice

__all__ = ["attention_fn"]


def attention_fn(
    spec: str | AttentionSpec = "softmax", *, backend: Choice = None, padding: bool = False
) -> Callable[..., Any]:
    """Make the `attention_fn` of `flax.nnx.MultiHeadAttention` and of Linen's attention layers.

    Parameters
    ----------
    spec : str or AttentionSpec
        The attention of the heads; head scaling has one scale for each key head.
    backend : str or sequence of str, optional
        As in `pdcore.bind`, settled now.
    padding : bool
        Says that masks hide padding and nothing else: every query of a sequence sees the same
        keys, or none. A mask that does more is then an error, and where it is traced, under
        `jax.jit`, its sequence becomes NaN.

    Returns
    -------
    callable
        With the arguments of `flax.nnx.dot_product_attention` and
        `flax.linen.dot_product_attention`. Two that were made from the same arguments are equal.

    Raises
    ------
    SpecError
        For a spec that is wrong.
    UnsupportedError
        For a spec with arrays as parameters, ``bn(beta=param)`` or ``bn(statistics=running)``: a
        function has no place for them.

    Notes
    -----
    Specs with statistics, pooled keys, ``causal`` or windows need to know which keys are real and
    where the queries stand. They read it off the mask and the lengths:

    - a key that no query sees is padding, or an entry of a cache that is not written: no part of
      attention, statistics and pooling;
    - as many queries as keys have the positions of the keys;
    - one query against several keys is a step of decoding: it stands at the last key that the
      mask shows it. Other lengths are refused by specs that go by position.

    A mask with a row for each query, (*B, H or 1, N, M), may be causal. Specs that take sequence
    statistics, which would then see the future, or pool keys without being causal, refuse it
    unless `padding` is True; one row for all queries, (*B, H or 1, 1, M), they take. ``causal``
    in the spec makes a causal mask unnecessary, and harmless.
    """
    return _Attention(spec, backend, padding)


class _Keys(NamedTuple):
    """What a mask and the lengths say: the arguments of `pdcore.attention`."""

    mask: Any
    key_mask: Any
    offset: int | str
    #: Sequences (*B,) whose mask is not what it was declared to be; None if that is known.
    wrong: Any


class _Attention:
    """The function that a layer of Flax calls, for one spec."""

    __slots__ = ("__weakref__", "_bound", "_by_position", "_needs_keys", "_padding", "_strict")

    def __init__(self, spec: str | AttentionSpec, backend: Choice, padding: bool) -> None:
        self._bound = Bound(spec, backend)
        self._padding = padding
        spec = self.spec
        if spec.parameters():
            names = ", ".join(p.name for p in spec.parameters())
            raise UnsupportedError(
                f"spec: {spec} takes the arrays {names}, and an attention_fn has no place for "
                "them; write numbers into the spec"
            )
        pools = spec.heads.largest > 1
        self._needs_keys = pools or spec.normalization.statistics_state() is not None
        self._by_position = spec.support.restricts or spec.prefix
        #: Whether a causal mask would make another attention of it than the spec says.
        self._strict = spec.support.ahead != 0 and (pools or spec.normalization.leaks)

    @property
    def spec(self) -> AttentionSpec:
        """The attention of the heads."""
        return self._bound.spec

    def __repr__(self) -> str:
        said = ", padding=True" if self._padding else ""
        return f"<pdcore attention_fn({str(self.spec)!r}{said})>"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Attention)
            and self._bound == other._bound
            and self._padding == other._padding
        )

    def __hash__(self) -> int:
        return hash((self._bound, self._padding))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Attention, (self.spec, self._bound.attention.choice, self._padding)

    # Linen passes only arguments that it finds here by name: one that is missing is dropped by it
    # without a word.
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
    ) -> Any:
        """Attend, as `flax.nnx.dot_product_attention` and `flax.linen.dot_product_attention` do.

        Parameters
        ----------
        query : array (*B, N, H, D)
        key : array (*B, M, Hkv, D)
        value : array (*B, M, Hkv, Dv)
        bias : array broadcastable to (*B, H, N, M), optional
            Added to log kappa; -inf removes a key, but it stays in statistics.
        mask : array broadcastable to (*B, H, N, M), optional
            Any dtype; where it is not zero, a query may attend.
        broadcast_dropout, dropout_rng : optional
            How dropout would be drawn, so not read.
        dropout_rate : float
            Refused above 0 in training.
        deterministic : bool
            Whether this is no training.
        dtype : dtype, optional
            Of the computation; query, key and value are cast to it.
        precision : optional
            A `jax.lax.Precision` by any of its names: what products have at least. They always
            have the full precision of their dtype.
        module : flax.nnx.Module or flax.linen.Module, optional
            Gets the weights, (*B, H, N, M), sown as ``attention_weights``.
        promote_dtype : callable, optional
            As in `flax.nnx.dot_product_attention`.
        is_causal : bool
            Adds ``causal`` to the spec.
        force_fp32_for_softmax : bool
            Holds for 16- and 32-bit inputs in any case; refused for float64.
        einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum : optional
            Refused: the scores are not made by one product.

        Returns
        -------
        array (*B, N, H, Dv)

        Raises
        ------
        TypeError, ValueError, UnsupportedError
            Naming the argument.
        """
        _refuse_products(
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        _check_precision(precision)
        if not deterministic and dropout_rate > 0.0:
            raise UnsupportedError(
                f"dropout_rate: got {dropout_rate} in training, expected 0.0: attention on JAX "
                "has no dropout of its weights; use nnx.Dropout or nn.Dropout after the layer"
            )
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
        q, k, v = (jnp.swapaxes(jnp.asarray(x), -2, -3) for x in (query, key, value))
        attend = self._bound.attention
        if is_causal:
            if self._bound.leak:
                raise UnsupportedError(f"is_causal: {self._bound.leak}")
            attend = self._bound.causal
        keys = self._keys(q, k, mask, bias, is_causal)
        given = {"mask": keys.mask, "key_mask": keys.key_mask, "bias": bias, "offset": keys.offset}
        if module is not None:
            _sow(module, attend.weights(Inputs(q, k, v, **given)))
        out = jnp.swapaxes(attend(q, k, v, **given), -2, -3)
        if keys.wrong is not None:
            out = jnp.where(keys.wrong[..., None, None, None], jnp.nan, out)
        return out

    def _keys(self, q: Any, k: Any, mask: Any, bias: Any, is_causal: bool) -> _Keys:
        """Read the mask of a call."""
        lead, n, m = q.shape[:-3], q.shape[-2], k.shape[-2]
        strict = self._strict and not is_causal
        if strict and bias is not None and _rows(bias) > 1:
            raise UnsupportedError(
                f"bias: got shape {jnp.shape(bias)}, and a bias with a row for each query may "
                f"hide the future, which {self.spec} would see; expected (..., 1, {m}), or permit "
                "it with bn(allow_leak=true)"
            )
        by_position = self._by_position or is_causal
        step = by_position and n == 1 < m
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
                f"{(*q.shape[:-1], m)}"
            )
        full = jnp.reshape(mask, (1,) * (q.ndim - mask.ndim) + mask.shape)
        if strict and full.shape[-2] > 1 and not self._padding:
            raise UnsupportedError(
                f"mask: got shape {mask.shape}, and a mask with a row for each query may be "
                f"causal, where {self.spec} would see the future; put causal in the spec (bn is "
                f"causal+bn(statistics=prefix) there), give a mask (..., 1, {m}) of the real "
                "keys, or say attention_fn(padding=True)"
            )
        key_mask = jnp.any(full, (-3, -2))
        wrong = _undeclared(full, key_mask) if self._padding else None
        if not (self._needs_keys or step):
            return _Keys(mask, None, 0, wrong)
        key_mask = jnp.broadcast_to(key_mask, (*lead, m))
        alike = full.shape[-2] == full.shape[-3] == 1
        return _Keys(None if alike else mask, key_mask, "end" if step else 0, wrong)


def _undeclared(mask: Any, key_mask: Any) -> Any:
    """Find the sequences (*B,) in which queries see other keys than one another."""
    same = jnp.all(mask == key_mask[..., None, None, :], -1) | ~jnp.any(mask, -1)
    wrong = ~jnp.all(same, (-2, -1))
    if isinstance(wrong, jax.core.Tracer):
        return wrong
    if wrong.any():
        raise ValueError(
            "mask: queries of one sequence see other keys than one another, and "
            "attention_fn(padding=True) says that masks hide padding only; put causal or a window "
            "in the spec"
        )
    return None


def _rows(x: Any) -> int:
    """Give the length of the axis of queries of a mask or bias."""
    shape = jnp.shape(x)
    return int(shape[-2]) if len(shape) > 1 else 1


def _refuse_products(**given: Any) -> None:
    for name, product in given.items():
        if product is not None:
            raise UnsupportedError(
                f"{name}: got {product!r}, expected None: the scores are made block by block, not "
                "by a product that could be exchanged; use Flax's own attention for it"
            )


def _check_precision(precision: Any) -> None:
    """Refuse what names an algorithm instead of a precision to have at least."""
    if precision is None or isinstance(precision, jax.lax.Precision):
        return
    parts = precision if isinstance(precision, tuple) else (precision,)
    try:
        for part in parts:
            jax.lax.Precision(part)
    except ValueError as error:
        raise UnsupportedError(
            f"precision: got {precision!r}, expected None or a jax.lax.Precision: products have "
            "the full precision of their dtype, by the algorithm that the backend chooses"
        ) from error


def _sow(module: Any, weights: Any) -> None:
    if isinstance(module, nnx.Module):
        module.sow(nnx.Intermediate, "attention_weights", weights)
    elif isinstance(module, linen.Module):
        module.sow("intermediates", "attention_weights", weights)
    else:
        raise TypeError(
            f"module: got {type(module).__name__}, expected a flax.nnx.Module or a "
            "flax.linen.Module to sow the weights into"
        )
