"""`SpecAttention` and `LinenSpecAttention`, attentions of layers of Flax that keep arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen, nnx
from jax import numpy as jnp

from pdcore import AttentionSpec, Decoder

from ..bound import MOMENTUM, BoundSpec, Choice, Drop, check_running, new_arrays
from ..key_statistics import BATCHES, real_keys, updated
from .attention import Attention

__all__ = ["LinenSpecAttention", "SpecAttention"]


class KeptArrays:
    """The arrays of a layer during one call.

    Parameters
    ----------
    spec : AttentionSpec
        The spec of the layer.
    read : callable
        ``read(name)`` returns an array of the layer.
    write : callable or None
        ``write(name, array)`` replaces an array of the layer; None outside of training.
    momentum, axis_name
        As in `SpecAttention`.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        read: Callable[[str], Any],
        write: Callable[[str, Any], None] | None,
        momentum: float | None,
        axis_name: str | None,
    ) -> None:
        self.spec, self.read, self.write = spec, read, write
        self.momentum, self.axis_name = momentum, axis_name

    def params(self, spec: AttentionSpec, dtype: Any) -> dict[str, Any]:
        """Return the arrays that a call of a spec takes, for queries of a dtype."""
        dtype = jnp.promote_types(dtype, jnp.float32)
        return {p.name: jnp.asarray(self.read(_name(p)), dtype) for p in spec.parameters()}

    def track(self, k: Any, key_mask: Any, segments: Any) -> None:
        """Update the running statistics by the keys (*B, M, H, D) of a call."""
        names = [p.buffer for p in self.spec.parameters() if p.running]
        if not names or self.write is None:
            return
        key_mask = real_keys(self.spec, key_mask, segments, xp=jnp)
        buffers = {name: self.read(name) for name in (*names, BATCHES)}
        new = updated(self.spec, buffers, k, key_mask, self.momentum, self.axis_name)
        for name, x in new.items():
            self.write(name, x)


def _name(parameter: Any) -> str:
    return parameter.buffer or f"spec_{parameter.name}"


def _starts(
    spec: AttentionSpec, sizes: tuple[int, int, int], dtype: Any
) -> dict[str, tuple[bool, Any]]:
    """Return the arrays of a new layer by name, each with whether it is learned.

    The sizes are the numbers of key heads, features and query heads.
    """
    made = new_arrays(spec, sizes, xp=jnp, dtype=dtype)
    arrays = {_name(p): (not p.buffer, x) for p, x in made.items()}
    if any(p.running for p in made):
        arrays[BATCHES] = (False, jnp.zeros((), jnp.int32))
    return arrays


class SpecAttention(nnx.Module):  # type: ignore[misc]
    """The `attention_fn` of `flax.nnx.MultiHeadAttention` for a spec with arrays.

    Learned arrays are `flax.nnx.Param` ``spec_<name>``, such as ``spec_beta``. The slopes of
    ``alibi``, which are not learned, are a `flax.nnx.BatchStat` ``slopes``. Running statistics
    are `flax.nnx.BatchStat` ``running_mean``, ``running_var`` and ``num_batches_tracked``: in
    training, a call has the statistics of its batch and then updates them, unless the spec is
    causal, where it has the running ones as they were.

    Parameters
    ----------
    spec, backend, padding, drop
        As in `attention_fn`.
    key_heads, head_dim : int
        The numbers of key heads and of features of a head.
    query_heads : int, optional
        The number of query heads; by default that of key heads.
    momentum : float or None
        The weight of a batch in the running statistics; None for the mean over all batches.
    axis_name : str, optional
        The mapped axis along which there are other sequences of the batch.
    use_running_average : bool
        True outside of training; ``model.eval()`` and ``model.train()`` set it.
    param_dtype : dtype
        The dtype of the arrays.

    Raises
    ------
    SpecError, UnsupportedError, ValueError
        For a wrong spec, or a momentum for a spec without running statistics.
    """

    def __init__(
        self,
        spec: str | AttentionSpec,
        key_heads: int,
        head_dim: int,
        *,
        query_heads: int | None = None,
        backend: Choice = None,
        padding: bool = False,
        drop: Drop = "weights",
        momentum: float | None = MOMENTUM,
        axis_name: str | None = None,
        use_running_average: bool = False,
        param_dtype: Any = jnp.float32,
    ) -> None:
        bound = BoundSpec(spec, backend)
        bound.spec.for_heads(key_heads, "heads of the layer")
        check_running(bound.spec, momentum, axis_name=axis_name)
        self.spec = bound.spec
        self.momentum, self.axis_name = momentum, axis_name
        self.use_running_average = use_running_average
        self._in_evaluation = Attention(bound, padding, drop)
        self._in_training = Attention(bound.training, padding, drop)
        sizes = (key_heads, head_dim, query_heads or key_heads)
        for name, (learned, x) in _starts(bound.spec, sizes, param_dtype).items():
            setattr(self, name, nnx.Param(x) if learned else nnx.BatchStat(x))

    def decoder(self, dtype: Any) -> Decoder:
        """Return the decoder of the spec with the present arrays, for queries of a dtype."""
        kept = KeptArrays(self.spec, self._read, None, None, None)
        return self._in_evaluation.decoder(dtype, kept)

    def _read(self, name: str) -> Any:
        return getattr(self, name)[...]

    def __call__(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        """Attend, with the arguments of `attention_fn`."""

        def write(name: str, x: Any) -> None:
            getattr(self, name)[...] = x

        attend = self._in_evaluation if self.use_running_average else self._in_training
        change = None if self.use_running_average else write
        kept = KeptArrays(self.spec, self._read, change, self.momentum, self.axis_name)
        return attend(query, key, value, **options, kept=kept)


class LinenSpecAttention(linen.Module):  # type: ignore[misc]
    """The `attention_fn` of Linen's attention layers for a spec with arrays.

    As `SpecAttention`. Learned arrays are in the collection ``params``, others in ``batch_stats``,
    which a call in training needs to be mutable for running statistics.

    Attributes
    ----------
    spec, backend, padding, drop, momentum, axis_name, use_running_average, param_dtype
        As in `SpecAttention`.
    """

    spec: str | AttentionSpec
    backend: Choice = None
    padding: bool = False
    drop: Drop = "weights"
    momentum: float | None = MOMENTUM
    axis_name: str | None = None
    use_running_average: bool = False
    param_dtype: Any = jnp.float32

    @linen.compact  # type: ignore[untyped-decorator]
    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        bias: Any = None,
        mask: Any = None,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        segments: Any = None,
        labels: Any = None,
    ) -> Any:
        """Attend, with the arguments of `flax.linen.dot_product_attention`, segments and labels."""
        bound = BoundSpec(self.spec, self.backend)
        check_running(bound.spec, self.momentum, axis_name=self.axis_name)
        variables: dict[str, Any] = {}
        sizes = (key.shape[-2], key.shape[-1], query.shape[-2])
        starts = _starts(bound.spec, sizes, self.param_dtype)
        for name, (learned, x) in starts.items():
            if learned:
                variables[name] = self.param(name, lambda _, x=x: x)
            else:
                variables[name] = self.variable("batch_stats", name, lambda x=x: x)

        def read(name: str) -> Any:
            return variables[name] if starts[name][0] else variables[name].value

        def write(name: str, x: Any) -> None:
            variables[name].value = x

        fixed = self.use_running_average
        change = None if fixed or self.is_initializing() else write
        kept = KeptArrays(bound.spec, read, change, self.momentum, self.axis_name)
        return Attention(bound if fixed else bound.training, self.padding, self.drop)(
            query,
            key,
            value,
            bias,
            mask,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            module=module,
            force_fp32_for_softmax=force_fp32_for_softmax,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            segments=segments,
            labels=labels,
            kept=kept,
        )
