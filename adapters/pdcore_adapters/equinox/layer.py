"""`PDMultiheadAttention`, an `equinox.nn.MultiheadAttention` with the attention of a spec.

Notation: H heads, N queries, M keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import equinox
import jax
from equinox.nn import MultiheadAttention
from jax import numpy as jnp

from pdcore import AttentionSpec, Decoder, UnsupportedError

from ..bound import MOMENTUM, BoundSpec, Choice, Drop
from ..jax_seed import seed_of
from ..key_statistics import real_keys, updated
from .state import attach_spec

__all__ = ["PDMultiheadAttention"]


class PDMultiheadAttention(MultiheadAttention):  # type: ignore[misc]
    """Multi-head attention whose heads compute the attention of a spec.

    Arguments, call and leaves are those of `equinox.nn.MultiheadAttention`, so leaves that one
    class serialised can be loaded by the other; with ``spec="softmax"`` results are equal too.
    Arguments that have no meaning for a spec are refused.

    Parameters
    ----------
    num_heads, query_size, key_size, value_size, output_size, qk_size, vo_size
        As in `equinox.nn.MultiheadAttention`.
    use_query_bias, use_key_bias, use_value_bias, use_output_bias, inference, dtype, key
        As in `equinox.nn.MultiheadAttention`.
    dropout_p : float
        The probability that a weight, or an output, is dropped in training.
    spec : str or AttentionSpec
        The attention of every head, with no scales, one for each of the `num_heads` heads, or
        ``sh(half=2)``.
        A spec with learned arrays adds leaves: ``bn(beta=param)`` has ``spec_params["beta"]``
        (num_heads,), which starts at 1. ``alibi`` adds its default slopes,
        ``spec_params["slopes"]`` (num_heads,), which have no gradient. ``bn(statistics=running)``
        has a state, see Notes.
    backend : str or sequence of str, optional
        As in `pdcore.bind`; the choice is made when the layer is created.
    drop : {"weights", "output"}
        What dropout drops: weights, as in `equinox.nn.MultiheadAttention`, or outputs of the layer,
        for a feature map, such as ``linear``, which has no weights.
    momentum : float or None
        The weight of a call's statistics in the running ones; None for their mean over all calls.
    axis_name : str, optional
        The name of the axis of `jax.vmap` along which the sequences of a batch are, for running
        statistics.

    Raises
    ------
    SpecError, ValueError
        For a spec that is wrong or does not have `num_heads` scales.
    UnsupportedError
        For dropout of the weights of a feature map, unless `inference` is True.

    Notes
    -----
    The attention of a query that sees no key is zero; in `equinox.nn.MultiheadAttention` it is the
    mean of the values. Under `jax.vmap`, ``bn(statistics=batch)`` takes the statistics of one
    sequence.

    With ``bn(statistics=running)``, ``out, state = layer(x, x, x, state=state)``, with an
    `equinox.nn.State`. In training, T has the statistics of the call's sequence, and those of all
    sequences along `axis_name` update the state; a causal layer, and inference, have the state's.
    """

    spec_params: dict[str, Any]
    running: Any
    axis_name: str | None = equinox.field(static=True)
    momentum: float | None = equinox.field(static=True)
    drop: Drop = equinox.field(static=True)
    _bound: BoundSpec = equinox.field(static=True)

    def __init__(
        self,
        num_heads: int,
        query_size: int,
        key_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        qk_size: int | None = None,
        vo_size: int | None = None,
        use_query_bias: bool = False,
        use_key_bias: bool = False,
        use_value_bias: bool = False,
        use_output_bias: bool = False,
        dropout_p: float = 0.0,
        inference: bool = False,
        dtype: Any = None,
        *,
        key: Any,
        spec: str | AttentionSpec = "softmax",
        backend: Choice = None,
        drop: Drop = "weights",
        momentum: float | None = MOMENTUM,
        axis_name: str | None = None,
    ) -> None:
        bound = BoundSpec(spec, backend)
        sizes = (num_heads, query_size, key_size, value_size, output_size, qk_size, vo_size)
        biases = (use_query_bias, use_key_bias, use_value_bias, use_output_bias)
        super().__init__(*sizes, *biases, dropout_p, inference, dtype, key=key)
        attach_spec(self, bound, drop, momentum, axis_name)

    @property
    def spec(self) -> AttentionSpec:
        """The attention of the heads."""
        return self._bound.spec

    def __call__(
        self,
        query: Any,
        key_: Any,
        value: Any,
        mask: Any = None,
        *,
        key: Any = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: Callable[..., Any] | None = None,
        key_mask: Any = None,
        offset: Any = None,
        state: Any = None,
        segments: Any = None,
        labels: Any = None,
    ) -> Any:
        """Attend from `query` to `key_` and `value`.

        Parameters
        ----------
        query : array (N, query_size)
        key_ : array (M, key_size)
        value : array (M, value_size)
        mask : bool array (N, M) or (num_heads, N, M), optional
            True where a query may attend to a key. Statistics do not depend on it.
        key : PRNG key, optional
            The key of dropout, required by it in training; under `jax.vmap` one for each example.
        inference : bool, optional
            As in `equinox.nn.Dropout`.
        deterministic : bool, optional
            The old name of `inference`.
        process_heads : callable, optional
            As in `equinox.nn.MultiheadAttention`: a function of the heads (N or M, num_heads,
            size), which must not change their shapes.
        key_mask : bool array (M,), optional
            True for a real key. Padding is excluded from attention, statistics and pooling.
        offset : int or integer array (), optional
            The position of the first query among the keys; by default 0. Required, if there are
            not as many queries as keys, by specs that depend on positions.
        state : equinox.nn.State, optional
            The state of the model, for a layer with running statistics, and only for such.
        segments : integer array (N,), or a pair, (N,) and (M,), optional
            Ids of the packed sequences of queries and keys, negative for padding, as in
            `pdcore.attention`.
        labels : integer array (N,), or a pair, (N,) and (M,), optional
            The labels of queries and keys, for a spec such as ``labels(4)``.

        Returns
        -------
        array (N, output_size), or (array, state) for a layer with running statistics

        Raises
        ------
        TypeError, ValueError
            For a wrong argument.
        UnsupportedError
            For a mask with statistics of the whole sequence, which
            may depend on a future that the mask hides, unless the spec has ``allow_leak=true``.
        """
        if deterministic is not None:
            inference = deterministic
            warnings.warn(
                "PDMultiheadAttention()(deterministic=...) is deprecated in favour of "
                "PDMultiheadAttention()(inference=...)",
                stacklevel=2,
            )
        inference = self.dropout.inference if inference is None else inference
        dropped = self._dropout(inference, key)
        self._check_state(state)
        bound = self._bound if inference else self._bound.training
        _check_inputs(query, key_, value)
        self._check_mask(mask, (query.shape[0], key_.shape[0]), bound.spec)
        heads = self._heads(query, key_, value, process_heads)
        buffers = {} if state is None else state.get(self.running)
        params = self._params(bound.spec, buffers, heads[0].dtype)
        out = bound.attention(
            *heads,
            mask=mask,
            key_mask=key_mask,
            offset=self._offset(offset, query.shape[0], key_.shape[0]),
            segments=segments,
            labels=labels,
            params=params,
            layout="bnhd",
            **(dropped if self.drop == "weights" else {}),
        )
        out = jax.vmap(self.output_proj)(out.reshape(query.shape[0], -1))
        if dropped and self.drop == "output":
            out = self.dropout(out, key=key, inference=False)
        if state is None:
            return out
        if not inference:
            how = (self.momentum, self.axis_name)
            real = real_keys(self.spec, key_mask, segments, xp=jnp)
            state = state.set(self.running, updated(self.spec, buffers, heads[1], real, *how))
        return out, state

    def init_cache(
        self, capacity: int | None, *, undo: int = 0, state: Any = None
    ) -> dict[str, Any]:
        """Return the state of a decoder for an empty sequence, for `extend`.

        Parameters
        ----------
        capacity : int or None
            The most positions of the sequence; None for a spec whose state does not grow.
        undo : int
            As in `pdcore.Decoder.init`.
        state : equinox.nn.State, optional
            As in a call.

        Returns
        -------
        dict of str to array

        Raises
        ------
        UnsupportedError
            For a spec that `pdcore.decoder` refuses, with ``causal`` added.
        """
        like = self.query_proj.weight[:0]
        sizes = (self.num_heads, self.qk_size, self.vo_size)
        return self._decoder(state, like.dtype).init((), *sizes, capacity, undo=undo, like=like)

    def extend(
        self,
        cache: dict[str, Any],
        query: Any,
        key_: Any,
        value: Any,
        *,
        lengths: Any = None,
        process_heads: Callable[..., Any] | None = None,
        state: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Attend from the next positions of a sequence, at the cost of those positions.

        The rows are those of a causal call on the whole sequence, outside of training.

        Parameters
        ----------
        cache : dict of str to array
            What `init_cache` or the call before returned.
        query, key_, value : array (N, size)
            The next positions, any number of them.
        lengths : integer array (), or bool array (N,), optional
            Which of them are real, as in `pdcore.Decoder.extend`.
        process_heads, state
            As in a call; the state of the model does not change.

        Returns
        -------
        out : array (N, output_size)
        cache : dict of str to array

        Raises
        ------
        UnsupportedError
            For dropout in training.
        """
        p = self.dropout.p
        if not self.dropout.inference and not (isinstance(p, int | float) and p == 0):
            raise UnsupportedError(
                f"dropout_p: got {p} in training, and a decoder drops nothing; use "
                "equinox.nn.inference_mode(layer)"
            )
        _check_inputs(query, key_, value)
        heads = self._heads(query, key_, value, process_heads)
        q, k, v = (jnp.swapaxes(x, 0, 1) for x in heads)
        decode = self._decoder(state, q.dtype)
        rows, cache = decode.extend(cache, q, k, v, lengths=lengths)
        rows = jnp.swapaxes(rows, 0, 1).reshape(query.shape[0], -1)
        return jax.vmap(self.output_proj)(rows), cache

    def _decoder(self, state: Any, dtype: Any) -> Decoder:
        """Return the decoder of the spec with the present arrays, for queries of a dtype."""
        self._check_state(state)
        buffers = {} if state is None else state.get(self.running)
        return self._bound.decoder(self._params(self.spec, buffers, dtype))

    def _heads(self, query: Any, key_: Any, value: Any, process: Any) -> tuple[Any, Any, Any]:
        """Return queries, keys and values, (N or M, num_heads, size)."""
        heads = (
            self._project(self.query_proj, query),
            self._project(self.key_proj, key_),
            self._project(self.value_proj, value),
        )
        if process is None:
            return heads
        shapes = [x.shape for x in heads]
        q, k, v = process(*heads)
        if [x.shape for x in (q, k, v)] != shapes:
            raise ValueError(
                f"process_heads: got shapes {[x.shape for x in (q, k, v)]}, expected "
                f"{shapes}: it must not change them"
            )
        return q, k, v

    def _params(self, spec: AttentionSpec, buffers: Any, dtype: Any) -> dict[str, Any]:
        """Return the arrays that a call of a spec takes, for queries of a dtype."""
        arrays, dtype = {}, jnp.promote_types(dtype, jnp.float32)
        for p in spec.parameters():
            x = buffers[p.buffer] if p.running else self.spec_params[p.name]
            arrays[p.name] = jnp.asarray(jax.lax.stop_gradient(x) if p.buffer else x, dtype)
        return arrays

    def _check_state(self, state: Any) -> None:
        """Raise unless there is a state exactly where the layer has running statistics."""
        want = "None" if self.running is None else "an equinox.nn.State, as equinox.nn.State(layer)"
        if isinstance(state, equinox.nn.State) != (self.running is not None):
            raise TypeError(f"state: got {type(state).__name__} for {self.spec}, expected {want}")

    def _dropout(self, inference: Any, key: Any) -> dict[str, Any]:
        """Return the dropout of a call and its seed; none outside of training."""
        p = self.dropout.p
        if inference or (isinstance(p, int | float) and p == 0):
            return {}
        if not isinstance(p, int | float):
            raise TypeError(
                f"dropout_p: got {type(p).__name__} in training, expected a float; keep it out of "
                "what is traced or differentiated, as equinox.filter_jit does"
            )
        if key is None:
            raise ValueError(
                f"key: got None in training with dropout_p {p}, expected a PRNG key, or "
                "inference=True"
            )
        return {"dropout": float(p), "seed": seed_of(key)}

    def _check_mask(self, mask: Any, lengths: tuple[int, int], spec: AttentionSpec) -> None:
        if mask is None:
            return
        expected = (lengths, (self.num_heads, *lengths))
        if tuple(mask.shape) not in expected:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, expected {' or '.join(map(str, expected))}"
            )
        if spec.normalization.leaks:
            choice = spec.normalization.causal_choice
            raise UnsupportedError(
                f"mask: {spec} is computed from all keys, and a mask may hide the future; give "
                f"padding as key_mask, {f'make a causal layer with {choice}, ' if choice else ''}"
                f"or permit it with {spec.normalization.word}(allow_leak=true)"
            )

    def _offset(self, offset: Any, n: int, m: int) -> Any:
        if offset is not None:
            return offset
        spec = self.spec
        if n != m and (spec.support.restricts or spec.prefix):
            raise ValueError(
                f"offset: missing for {n} queries and {m} keys, and {spec} goes by position; "
                "expected the position of the first query among the keys"
            )
        return 0


def _check_inputs(query: Any, key_: Any, value: Any) -> None:
    for name, x in (("query", query), ("key_", key_), ("value", value)):
        if jnp.ndim(x) != 2:
            raise ValueError(
                f"{name}: got shape {jnp.shape(x)}, expected (length, size); use jax.vmap over a "
                "batch"
            )
    if key_.shape[0] != value.shape[0]:
        raise ValueError(
            f"value: got {value.shape[0]} elements, expected {key_.shape[0]} like key_"
        )
