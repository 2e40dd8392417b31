"""`PDMultiheadAttention`, an `nn.MultiheadAttention` with the attention of a spec."""

from __future__ import annotations

import math
from typing import Any, Never

import torch
from torch import fx, nn
from torch.nn import functional

from pdcore import AttentionSpec, UnsupportedError
from pdcore.extend import Inputs, finite_dropout

from ..bound import MOMENTUM, BoundSpec, Choice, Drop, check_drop, refuse_dropout
from ..watching import tell
from .masks import check_addend, check_hides_only, check_mask, require, with_batch
from .state import arrays_of, attach_spec, group_of, track
from .words import APPENDED_KEY, as_leaf, wrong_call, wrong_layer

__all__ = ["PDMultiheadAttention"]


class PDMultiheadAttention(nn.MultiheadAttention):  # type: ignore[misc]
    """Multi-head attention whose heads compute the attention of a spec.

    Arguments, call and parameters are those of `torch.nn.MultiheadAttention`, so checkpoints of one
    class can be loaded by the other; with ``spec="softmax"``, results are equal too. Arguments that
    have no meaning for a spec are refused.

    Parameters
    ----------
    embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype
        As in `torch.nn.MultiheadAttention`.
    dropout : float
        The probability that a weight, or an output, is dropped in training, 0 <= p < 1.
    add_bias_kv, add_zero_attn : bool
        Refused, since they append a key that is no element of the sequence: it has no position
        and no place in the statistics.
    spec : str or AttentionSpec
        The attention of every head, with no scales, one for each of the `num_heads` heads, or
        ``sh(half=2)``. A spec with arrays adds them to the state dict: ``bn(beta=param)`` a
        parameter ``spec_beta`` (num_heads,), which starts at 1, ``h(sum,sink=param)`` one
        ``spec_sink`` (num_heads,), and ``relative`` and ``labels`` their tables
        ``spec_relative`` and ``spec_influence``, which start at 0, ``bn(statistics=running)`` the
        buffers ``running_mean``, ``running_var`` (num_heads, head_dim) and ``num_batches_tracked``,
        ``alibi`` a buffer ``slopes`` (num_heads,) of its default slopes.
    backend : str or sequence of str, optional
        As in `pdcore.bind`; the choice is made when the layer is created.
    drop : {"weights", "output"}
        What `dropout` drops: normalised weights, as in `torch.nn.MultiheadAttention`, or outputs of
        the layer, for a feature map, such as ``linear``, which has no weights.
    momentum : float or None
        The weight of a batch in the running statistics, as in `torch.nn.BatchNorm1d`; None for
        the mean over all batches.
    process_group : torch.distributed.ProcessGroup, optional
        The processes whose keys together are the batch by which the running statistics are
        updated; by default those of `group`, or of this process alone.
    group : torch.distributed.ProcessGroup, or DeviceMesh of one dimension, optional
        The processes over which the sequences are cut, as in `pdcore.attention`: query, key, value
        and `key_padding_mask` are the part of this rank, and so is the result. It takes no
        `attn_mask` and ``need_weights=False``; put ``causal`` into the spec.

    Raises
    ------
    SpecError, ValueError
        For a spec that is wrong or does not have `num_heads` scales.
    UnsupportedError
        For `add_bias_kv`, `add_zero_attn`, and dropout of the weights of a feature map.

    Notes
    -----
    Differences from `torch.nn.MultiheadAttention`:

    - The attention of a query that sees no key is zero, with zero weights, so its output is the
      bias of the output projection; in PyTorch it is NaN if weights are requested.
    - The returned weights are those before dropout.
    - With ``bn(statistics=running)``, a forward in training has the statistics of its batch and
      then updates the buffers, unless the layer is causal, where those of the batch contain the
      future: then it has the buffers as they were. In evaluation it has the buffers.
    - Nested tensors are refused. `torch.nn.TransformerEncoder` and its layer do not use their fast
      path, which would compute softmax attention without calling this layer.
    """

    # For `pdcore_adapters.transformers`: whether `convert` made the layer, after its model was
    # created, and whether it did so as the saved config of the model says.
    converted = False
    recorded = False
    drop: Drop = "weights"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        spec: str | AttentionSpec = "softmax",
        backend: Choice = None,
        drop: Drop = "weights",
        momentum: float | None = MOMENTUM,
        process_group: Any = None,
        group: Any = None,
        **unknown: Never,
    ) -> None:
        if unknown:
            raise wrong_layer(PDMultiheadAttention.__init__, unknown)
        bound = BoundSpec(spec, backend)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise UnsupportedError(f"{name}: got {value!r}, expected False; {APPENDED_KEY}")
        check_drop(drop)
        if drop == "weights":
            advice = "dropout=0, or drop='output', which drops outputs of the layer in their place"
            refuse_dropout(bound.spec, "dropout", dropout, advice)
        super().__init__(
            embed_dim,
            num_heads,
            dropout=finite_dropout(dropout),
            bias=bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        bound.spec.for_heads(num_heads, "heads of the layer")
        attach_spec(self, bound, momentum, process_group, group)
        self.drop = drop

    @property
    def spec(self) -> AttentionSpec:
        """The attention of the heads."""
        spec: AttentionSpec = self._bound.spec
        return spec

    @property
    def _mode(self) -> BoundSpec:
        """What the layer computes in training, or in evaluation."""
        bound: BoundSpec = self._bound
        return bound.training if self.training else bound

    def extra_repr(self) -> str:
        """Return the arguments that differ from the defaults, and the spec, for `repr`."""
        words = [f"{self.embed_dim}, {self.num_heads}, spec={str(self.spec)!r}"]
        for name, default in (
            ("dropout", 0.0),
            ("kdim", self.embed_dim),
            ("vdim", self.embed_dim),
            ("batch_first", False),
            ("drop", "weights"),
            ("momentum", MOMENTUM),
        ):
            if getattr(self, name) != default:
                words.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(words)

    def _reset_parameters(self) -> None:
        # The method of the base class reads a flag that `attach_spec` clears.
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if (weight := getattr(self, name)) is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        segments: Any = None,
        labels: Any = None,
        **unknown: Never,
    ) -> tuple[Any, Any]:
        """Attend from `query` to `key` and `value`.

        Parameters
        ----------
        query : Tensor (N, B, embed_dim), (B, N, embed_dim) if batch_first, or (N, embed_dim)
        key : Tensor (M, B, kdim), (B, M, kdim) or (M, kdim)
        value : Tensor (M, B, vdim), (B, M, vdim) or (M, vdim)
        key_padding_mask : Tensor (B, M) or (M,), optional
            bool, True for padding; or floating-point, -inf for padding, other values added to
            log kappa of the key. Padding is no part of statistics and pooling either.
        need_weights : bool
            Return the weights too, which needs O(N M) memory.
        attn_mask : Tensor (N, M), (B num_heads, N, M), or (num_heads, N, M) unbatched, optional
            bool, True where a query may **not** attend; or floating-point, added to log kappa.
            Statistics do not depend on it. If the spec has no log kappa, or pools keys, a float
            mask may have the values 0 and -inf only.
        average_attn_weights : bool
            Return the mean of the weights over the heads, not the weights of each head.
        is_causal : bool
            The hint that `attn_mask` is the causal mask. ``causal`` is added to the spec. As in
            `torch.nn.MultiheadAttention`, `attn_mask` is then ignored without `key_padding_mask`
            and `need_weights`.
        segments : Tensor (B, N), or (N,) unbatched, or a pair, (B, N) and (B, M), optional
            Ids of the packed sequences of queries and keys, negative for padding, as in
            `pdcore.attention`.
        labels : Tensor (B, N), or (N,) unbatched, or a pair, (B, N) and (B, M), optional
            The labels of queries and keys, for a spec such as ``labels(4)``.

        Returns
        -------
        out : Tensor like `query`
        weights : Tensor (B, N, M), or (B, num_heads, N, M) if not averaged, or None
            Without the axis B for unbatched inputs; before dropout.

        Raises
        ------
        TypeError, ValueError
            For a wrong argument.
        UnsupportedError
            For nested tensors, for values of a float mask that the spec does not support, and if
            statistics of the whole sequence would leak the future: with `is_causal`, or with an
            `attn_mask` that hides all later keys, unless the spec has ``allow_leak=true``.
        """
        if isinstance(query, fx.Proxy):
            masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
            masks |= {"segments": segments, "labels": labels}
            flags = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
            leaf: tuple[Any, Any] = as_leaf(
                self, query, key, value, **masks, **flags, is_causal=is_causal
            )
            return leaf
        if unknown:
            raise wrong_call(PDMultiheadAttention.forward, unknown)
        if need_weights and self._group:
            raise UnsupportedError(
                "need_weights: got True in a layer whose sequences are cut over a group, expected "
                "False: the weights of a rank's queries are with the keys of all ranks"
            )
        self._check(query, key, value, key_padding_mask, attn_mask)
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value, batched)
        bound = self._mode
        attend = bound.attention
        if is_causal:
            if attn_mask is None:
                raise ValueError(
                    "is_causal: got True without attn_mask, expected the causal mask too, as "
                    "nn.MultiheadAttention does; or put causal in the spec"
                )
            if bound.causal_refusal:
                raise UnsupportedError(f"is_causal: {bound.causal_refusal}")
            attend = bound.causal
            if key_padding_mask is None and not need_weights:
                attn_mask = None
        mask, key_mask, bias = self._masks(attn_mask, key_padding_mask, q, k)
        call = {"mask": mask, "key_mask": key_mask, "bias": bias}
        call["segments"], call["labels"] = (
            x if batched else with_batch(x) for x in (segments, labels)
        )
        call["params"] = arrays_of(self, attend.spec)
        call |= group_of(self)
        p = self.dropout if self.training and self.drop == "weights" else 0.0
        out = attend(q, k, v, **call, dropout=p, layout="bnhd")
        tell(self, attend, Inputs(q, k, v, **call), out, "bnhd")
        out = out.transpose(0, 1) if batched and not self.batch_first else out
        out = functional.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if self.drop == "output":
            out = functional.dropout(out, self.dropout, self.training)
        weights = None
        if need_weights:
            weights = attend.weights(Inputs(q, k, v, **call), "bnhd")
            weights = weights.mean(1) if average_attn_weights else weights
        track(self, k, key_mask, call["segments"])
        if not batched:
            out, weights = out[0], None if weights is None else weights[0]
        return out, weights

    def _check(
        self, query: Any, key: Any, value: Any, key_padding_mask: Any, attn_mask: Any
    ) -> None:
        """Check shapes and dtypes against each other."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.is_nested:
                raise UnsupportedError(
                    f"{name}: got a nested tensor, expected a padded one, with key_padding_mask; "
                    "an nn.TransformerEncoder that makes nested tensors does not after "
                    "encoder.use_nested_tensor = False, or convert(encoder, ...)"
                )
        batched = query.dim() == 3
        axes = "(B, L, E)" if self.batch_first else "(L, B, E)"
        for name, x, size in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != size:
                raise ValueError(
                    f"{name}: got shape {tuple(x.shape)}, expected {axes}, or (L, E) for all of "
                    f"query, key and value, with E = {size}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: got shape {tuple(value.shape)}, expected the batch and "
                f"length of key {tuple(key.shape)}"
            )
        batch = query.shape[0 if self.batch_first else 1] if batched else 1
        if batched and key.shape[0 if self.batch_first else 1] != batch:
            raise ValueError(
                f"key: got shape {tuple(key.shape)}, expected the batch of query "
                f"{tuple(query.shape)}"
            )
        along = 1 if batched and self.batch_first else 0
        n, m = query.shape[along], key.shape[along]
        if attn_mask is not None:
            check_mask(attn_mask, "attn_mask", [(n, m), (batch * self.num_heads, n, m)])
        if key_padding_mask is not None:
            expected = (batch, m) if batched else (m,)
            check_mask(key_padding_mask, "key_padding_mask", [expected])

    def _project(self, query: Any, key: Any, value: Any, batched: bool) -> tuple[Any, Any, Any]:
        """Compute the projections to heads, (B, N, H, D) each."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and query is key and key is value:  # one product for all three
            projected = functional.linear(query, packed, bias).chunk(3, dim=-1)
        else:
            weights = (
                packed.chunk(3)
                if packed is not None
                else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            )
            biases = (None, None, None) if bias is None else bias.chunk(3)
            projected = tuple(
                functional.linear(x, w, b)
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        q, k, v = (self._heads(x, batched) for x in projected)
        return q, k, v

    def _heads(self, x: Any, batched: bool) -> Any:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _masks(self, attn_mask: Any, key_padding_mask: Any, q: Any, k: Any) -> tuple[Any, Any, Any]:
        """Return `mask`, `key_mask` and `bias` as `pdcore.attention` takes them.

        Apart from refusals, no branch depends on values: a float mask is a bias even if its values
        are 0 and -inf only. `nn.TransformerEncoderLayer` converts every mask to such a mask.
        """
        bound, mask, key_mask, bias = self._mode, None, None, None
        (batch, n, heads, _), m = q.shape, k.shape[1]
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.reshape(batch, heads, n, m)
            if attn_mask.dtype == torch.bool:
                mask = ~attn_mask
            elif bound.bias_refusal:
                check_hides_only(attn_mask, "attn_mask", bound.bias_refusal)
                mask = attn_mask == 0
            else:
                bias = check_addend(attn_mask, "attn_mask", q)
            # A causal mask is the usual way to a causal layer in PyTorch, but statistics do not
            # depend on a mask, so they would leak the future.
            if bound.hiding_refusal and n == m and n > 1:
                seen = mask if mask is not None else bias != -math.inf
                later = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1)
                message = f"attn_mask: it hides all later keys; {bound.hiding_refusal}"
                require((seen & later).any(), message)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.reshape(batch, m)
            if key_padding_mask.dtype == torch.bool:
                key_mask = ~key_padding_mask
            else:
                key_mask = key_padding_mask != -math.inf
                if bound.bias_refusal:
                    check_hides_only(key_padding_mask, "key_padding_mask", bound.bias_refusal)
                else:
                    key_bias = check_addend(key_padding_mask, "key_padding_mask", q)
                    key_bias = key_bias.masked_fill(~key_mask, 0.0)[:, None, None, :]
                    bias = key_bias if bias is None else bias + key_bias
        return mask, key_mask, bias
