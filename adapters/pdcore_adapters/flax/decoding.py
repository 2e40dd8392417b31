"""`DecoderAttention`, a layer of Flax that decodes with carried state."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import numpy as jnp

from pdcore import Decoder, UnsupportedError

from .attention import Attention
from .modules import SpecAttention

__all__ = ["DecoderAttention"]

#: Arguments of a call that a step of decoding does not take, with what to do.
_REFUSED = {
    "mask": "the state says what a row sees; mark padding by lengths=",
    "sow_weights": "a decoder has no weights; leave it out",
}


class DecoderAttention(nnx.MultiHeadAttention):  # type: ignore[misc]
    """A `flax.nnx.MultiHeadAttention` that decodes with the state of a `pdcore.decoder`.

    Arguments, arrays and calls are those of `flax.nnx.MultiHeadAttention`, whose `attention_fn` is
    one of `attention_fn`, or a `SpecAttention`. With ``decode=True`` a call takes the next
    positions of each sequence, any number of them, and costs what they cost: `init_cache` makes
    the state, and a call advances it. Decoding is causal, whether the spec says so or not.

    Attributes
    ----------
    carried : flax.nnx.Dict of str to flax.nnx.Cache, or None
        The state; None before `init_cache`.

    Examples
    --------
    >>> import jax
    >>> from pdcore_adapters.flax import attention_fn
    >>> attend = attention_fn("causal+linear")
    >>> layer = DecoderAttention(4, 16, attention_fn=attend, decode=True, rngs=nnx.Rngs(0))
    >>> layer.init_cache((2, 100, 16))
    >>> layer(jnp.ones((2, 7, 16))).shape  # a prompt
    (2, 7, 16)
    >>> layer(jnp.ones((2, 1, 16))).shape
    (2, 1, 16)
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not isinstance(self.attention_fn, Attention | SpecAttention):
            raise TypeError(
                f"attention_fn: got {self.attention_fn!r}, expected attention_fn(spec), or a "
                "SpecAttention, of pdcore_adapters.flax"
            )
        self.carried: Any = nnx.data(None)

    def decoder(self, dtype: Any = jnp.float32) -> Decoder:
        """Return the decoder of the state, with the present arrays of the spec.

        Its `truncate` and `reorder` take the arrays of `carried`.

        Parameters
        ----------
        dtype : dtype
            That of the queries, keys and values.

        Returns
        -------
        Decoder
        """
        made: Decoder = self.attention_fn.decoder(dtype)
        return made

    def init_cache(
        self, input_shape: tuple[int, ...], dtype: Any = jnp.float32, *, undo: int = 0
    ) -> None:
        """Set the state of empty sequences.

        Parameters
        ----------
        input_shape : tuple of int
            (*B, capacity, features): the leading axes, and the most positions of a sequence.
        dtype : dtype
            That of the queries, keys and values.
        undo : int
            As in `pdcore.Decoder.init`.

        Raises
        ------
        UnsupportedError
            For a spec that `pdcore.decoder` refuses.
        """
        *lead, capacity, _ = input_shape
        sizes = (self.num_kv_heads, self.head_dim, self.head_dim)
        like = jnp.zeros((), dtype)
        state = self.decoder(dtype).init(tuple(lead), *sizes, capacity, undo=undo, like=like)
        self.carried = nnx.Dict({name: nnx.Cache(x) for name, x in state.items()})

    def __call__(
        self,
        inputs_q: Any,
        inputs_k: Any = None,
        inputs_v: Any = None,
        *,
        decode: bool | None = None,
        lengths: Any = None,
        **options: Any,
    ) -> Any:
        """Attend as `flax.nnx.MultiHeadAttention` does, or from the next positions.

        Parameters
        ----------
        inputs_q, inputs_k, inputs_v, decode
            As in `flax.nnx.MultiHeadAttention`; those of the next positions with `decode`.
        lengths : integer array (*B,), or bool array (*B, N), optional
            Which of the next positions are real, as in `pdcore.Decoder.extend`.
        **options
            The other arguments of `flax.nnx.MultiHeadAttention`.

        Returns
        -------
        array (*B, N, out_features)

        Raises
        ------
        UnsupportedError
            With `decode` for a mask, weights to be sown, and dropout.
        ValueError
            For `decode` without `init_cache`.
        """
        if not (self.decode if decode is None else decode):
            if lengths is not None:
                raise ValueError("lengths: got an array without decode=True; pass a mask")
            return super().__call__(inputs_q, inputs_k, inputs_v, decode=decode, **options)
        self._check(options)
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        sharding = {"out_sharding": options.get("qkv_sharding")}
        q, k, v = (
            layer(x, **sharding)
            for layer, x in ((self.query, inputs_q), (self.key, inputs_k), (self.value, inputs_v))
        )
        if self.normalize_qk:
            q, k = self.query_ln(q), self.key_ln(k)
        heads = promote_dtype((q, k, v), dtype=self.dtype)
        q, k, v = (jnp.swapaxes(x, -3, -2) for x in heads)
        state = {name: x[...] for name, x in self.carried.items()}
        rows, state = self.decoder(q.dtype).extend(state, q, k, v, lengths=lengths)
        for name, x in state.items():
            self.carried[name][...] = x
        return self.out(jnp.swapaxes(rows, -3, -2), out_sharding=options.get("out_sharding"))

    def _check(self, options: dict[str, Any]) -> None:
        """Refuse what a step of decoding does not do."""
        if self.carried is None:
            raise ValueError("decode: got True without a state; call init_cache first")
        for name, advice in _REFUSED.items():
            value = options.get(name)
            if value is not None and value is not False:
                raise UnsupportedError(f"{name}: got it with decode=True; {advice}")
        fixed = options.get("deterministic")
        if self.dropout_rate and not (self.deterministic if fixed is None else fixed):
            raise UnsupportedError(
                f"dropout_rate: got {self.dropout_rate} with decode=True, and a decoder drops "
                "nothing; pass deterministic=True, or call model.eval()"
            )
