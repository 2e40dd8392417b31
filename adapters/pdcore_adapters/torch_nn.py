"""`PDMultiheadAttention`, an `nn.MultiheadAttention` with the attention of a spec, and `convert`.

>>> import torch
>>> layer = PDMultiheadAttention(16, 4, spec="bn+sh(1,1,2,2)", batch_first=True)
>>> x = torch.randn(2, 10, 16)
>>> out, weights = layer(x, x, x)
>>> out.shape, weights.shape
(torch.Size([2, 10, 16]), torch.Size([2, 10, 10]))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from pdcore import AttentionSpec, UnsupportedError
from pdcore.extend import Inputs, finite_dropout, parameter_shape

from .bound import Bound, Choice, learned

__all__ = ["Conversion", "PDMultiheadAttention", "convert"]


class PDMultiheadAttention(nn.MultiheadAttention):  # type: ignore[misc]
    """Multi-head attention whose heads compute the attention of a spec.

    Arguments, call and parameters are those of `torch.nn.MultiheadAttention`, so checkpoints load
    both ways; with ``spec="softmax"`` so are the numbers. What it cannot honour it refuses.

    Parameters
    ----------
    embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype
        As in `torch.nn.MultiheadAttention`.
    dropout : float
        Dropout of the normalised weights in training, 0 <= p < 1.
    add_bias_kv, add_zero_attn : bool
        Refused: they append a key that is no element of the sequence, with no position and no
        place in its statistics.
    spec : str or AttentionSpec
        The attention of every head. A scale for each of the `num_heads` heads, if it has scales.
        ``bn(beta=param)`` adds a parameter ``spec_beta`` (num_heads,), which starts at 1; no
        other spec changes the keys of the state dict.
    backend : str or sequence of str, optional
        As in `pdcore.bind`, settled now.

    Raises
    ------
    SpecError, ValueError
        For a spec that is wrong or does not have `num_heads` scales.
    UnsupportedError
        For `add_bias_kv`, `add_zero_attn`, and specs whose parameters the layer does not keep:
        running statistics.

    Notes
    -----
    In these respects it is not `torch.nn.MultiheadAttention`:

    - A query that sees no key gets zeros from the attention, and so the bias of the output
      projection, with zero weights; there it is NaN if weights are asked for.
    - Weights are returned as they are before dropout.
    - Nested tensors are refused. `torch.nn.TransformerEncoder` and its layer do not take their
      fast path around it, which would compute softmax attention without a call.
    """

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
    ) -> None:
        bound = Bound(spec, backend)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise UnsupportedError(f"{name}: got {value!r}, expected False; {_APPENDED}")
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
        if problem := _misfit(bound.spec, self):
            raise ValueError(problem)
        _adopt(self, bound)

    @property
    def spec(self) -> AttentionSpec:
        """The attention of the heads."""
        spec: AttentionSpec = self._bound.spec
        return spec

    def extra_repr(self) -> str:
        """Give the arguments that differ from the defaults, and the spec."""
        words = [f"{self.embed_dim}, {self.num_heads}, spec={str(self.spec)!r}"]
        for name, default in (
            ("dropout", 0.0),
            ("kdim", self.embed_dim),
            ("vdim", self.embed_dim),
            ("batch_first", False),
        ):
            if getattr(self, name) != default:
                words.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(words)

    def _reset_parameters(self) -> None:
        # The base class asks the flag that `_adopt` clears.
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
            Return the weights too, which builds the (N, M) array.
        attn_mask : Tensor (N, M), (B num_heads, N, M), or (num_heads, N, M) unbatched, optional
            bool, True where a query may **not** attend; or floating-point, added to log kappa.
            It changes no statistic. With a spec that has no log kappa, or pools keys, a float
            mask may hold 0 and -inf only.
        average_attn_weights : bool
            Return the mean of the weights over the heads.
        is_causal : bool
            The hint that `attn_mask` is the causal mask. It makes the spec causal, and
            `attn_mask` is then not read where `torch.nn.MultiheadAttention` does not read it:
            without `key_padding_mask` and `need_weights`.

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
            For nested tensors, for values of a float mask that the spec has no place for, and
            where statistics of the whole sequence would leak the future: with `is_causal`, or an
            `attn_mask` that hides all later keys, unless the spec has ``allow_leak=true``.
        """
        self._check(query, key, value, key_padding_mask, attn_mask)
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value, batched)
        bound = self._bound
        attend = bound.attention
        if is_causal:
            if attn_mask is None:
                raise ValueError(
                    "is_causal: got True without attn_mask, expected the causal mask too, as "
                    "nn.MultiheadAttention does; or put causal in the spec"
                )
            if bound.leak:
                raise UnsupportedError(f"is_causal: {bound.leak}")
            attend = bound.causal
            if key_padding_mask is None and not need_weights:
                attn_mask = None
        mask, key_mask, bias = self._masks(attn_mask, key_padding_mask, q, k)
        params = {name: getattr(self, "spec_" + name) for name in self._learned}
        out = attend(
            q,
            k,
            v,
            mask=mask,
            key_mask=key_mask,
            bias=bias,
            params=params,
            dropout=self.dropout if self.training else 0.0,
        )
        out = out.permute((0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3))
        out = functional.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        weights = None
        if need_weights:
            weights = attend.weights(Inputs(q, k, v, mask, key_mask, bias, params=params))
            weights = weights.mean(1) if average_attn_weights else weights
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
            _check_mask(attn_mask, "attn_mask", [(n, m), (batch * self.num_heads, n, m)])
        if key_padding_mask is not None:
            expected = (batch, m) if batched else (m,)
            _check_mask(key_padding_mask, "key_padding_mask", [expected])

    def _project(self, query: Any, key: Any, value: Any, batched: bool) -> tuple[Any, Any, Any]:
        """Project to heads, (B, H, N, D) each."""
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
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _masks(self, attn_mask: Any, key_padding_mask: Any, q: Any, k: Any) -> tuple[Any, Any, Any]:
        """Give `mask`, `key_mask` and `bias` as `pdcore.attention` takes them.

        No branch depends on values, apart from refusals: a float mask is a bias even where it
        only holds 0 and -inf, which is what `nn.TransformerEncoderLayer` makes of every mask.
        """
        bound, mask, key_mask, bias = self._bound, None, None, None
        batch, heads, n, _ = q.shape
        m = k.shape[-2]
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.reshape(batch, heads, n, m)
            if attn_mask.dtype == torch.bool:
                mask = ~attn_mask
            elif bound.unbiased:
                _only_cuts(attn_mask, "attn_mask", bound.unbiased)
                mask = attn_mask == 0
            else:
                bias = _addend(attn_mask, "attn_mask", q)
            # The usual way to a causal layer here, and statistics do not follow a mask.
            if bound.leak and n == m and n > 1:
                seen = mask if mask is not None else bias != -math.inf
                later = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1)
                _demand((seen & later).any(), f"attn_mask: it hides all later keys; {bound.leak}")
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.reshape(batch, m)
            if key_padding_mask.dtype == torch.bool:
                key_mask = ~key_padding_mask
            else:
                key_mask = key_padding_mask != -math.inf
                if bound.unbiased:
                    _only_cuts(key_padding_mask, "key_padding_mask", bound.unbiased)
                else:
                    added = _addend(key_padding_mask, "key_padding_mask", q)
                    added = added.masked_fill(~key_mask, 0.0)[:, None, None, :]
                    bias = added if bias is None else bias + added
        return mask, key_mask, bias


_APPENDED = (
    "the key that it appends is no element of the sequence, with no position and no place in its "
    "statistics; use nn.MultiheadAttention for it"
)


def _misfit(spec: AttentionSpec, layer: Any) -> str:
    """Say why a spec does not fit a layer, "" if it does."""
    scales = spec.heads.scales
    if scales and len(scales) != layer.num_heads:
        return (
            f"spec: got {len(scales)} scales in {spec}, expected one for each of the "
            f"{layer.num_heads} heads"
        )
    return ""


def _adopt(layer: Any, bound: Bound) -> list[str]:
    """Give a layer its spec, and return the names of the parameters that are new."""
    starts = learned(bound.spec)
    for name in getattr(layer, "_learned", ()):
        if name not in starts:
            delattr(layer, "spec_" + name)
    new = [name for name in starts if not hasattr(layer, "spec_" + name)]
    like = next(layer.parameters())
    for p in bound.spec.parameters():
        if p.name in new:
            shape = parameter_shape(p.shapes[0], layer.num_heads, layer.head_dim)
            value = torch.full(shape, starts[p.name], dtype=like.dtype, device=like.device)
            layer.register_parameter("spec_" + p.name, nn.Parameter(value))
    layer._learned = tuple(starts)
    layer._bound = bound
    # A condition of the fast paths of `nn.TransformerEncoderLayer` and `nn.TransformerEncoder`,
    # which read the weights of this layer and never call it.
    layer._qkv_same_embed_dim = False
    return ["spec_" + name for name in new]


def _check_mask(mask: Any, name: str, shapes: list[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name}: got dtype {mask.dtype}, expected bool, True where it hides, or a "
            "floating-point dtype"
        )
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"{name}: got shape {tuple(mask.shape)}, expected {' or '.join(map(str, shapes))}"
        )


def _addend(mask: Any, name: str, q: Any) -> Any:
    if mask.dtype not in (torch.float32, q.dtype):
        expected = " or ".join(str(dtype) for dtype in {torch.float32, q.dtype})
        raise TypeError(f"{name}: got dtype {mask.dtype}, expected bool or {expected}")
    return mask


def _only_cuts(mask: Any, name: str, reason: str) -> None:
    """Refuse values that would have to be added where there is nothing to add them to."""
    _demand(
        ((mask == 0) | (mask == -math.inf)).all(),
        f"{name}: got a float mask with values other than 0 and -inf, and {reason}; give a bool "
        "mask, True where it hides",
    )


def _demand(condition: Any, message: str) -> None:
    """Raise unless the values of the arguments are as they must be."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)  # no branch: it stays in the graph
    elif not condition:
        raise UnsupportedError(message)


@dataclass(frozen=True, repr=False)
class Conversion:
    """What `convert` did to a model; it prints as text.

    Attributes
    ----------
    spec : AttentionSpec
        The attention that the layers have now.
    converted : tuple of str
        The names of the layers, as in `named_modules`; a shared one has several.
    left : dict of str to str
        The other attention layers, each with the reason.
    nested : tuple of str
        Encoders whose nested tensors were turned off.
    parameters : tuple of str
        Parameters that are new, for the optimizer.
    """

    spec: AttentionSpec
    converted: tuple[str, ...]
    left: dict[str, str]
    nested: tuple[str, ...]
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        if not self.converted and not self.left:
            return "nothing converted: the model has no nn.MultiheadAttention"
        parts = [
            (f"converted to {self.spec}", self.converted),
            ("left as it was", [f"{_shown(name)}: {why}" for name, why in self.left.items()]),
            ("nested tensors turned off, which would pass the layers by", self.nested),
            ("new parameters, for the optimizer", self.parameters),
        ]
        lines = []
        for title, entries in parts:
            if entries:
                lines += [title, *(f"  {_shown(entry)}" for entry in entries)]
        return "\n".join(lines)

    __repr__ = __str__


def _shown(name: str) -> str:
    return name or "the model itself"


def convert(
    model: nn.Module,
    spec: str | AttentionSpec,
    *,
    backend: Choice = None,
    select: Callable[[str, nn.MultiheadAttention], bool] | None = None,
) -> Conversion:
    """Make every `nn.MultiheadAttention` of a model a `PDMultiheadAttention`, in place.

    The modules stay the same objects, with their parameters, hooks, mode and names, so
    optimizers and modules that are used in several places go on as before.

    Parameters
    ----------
    model : nn.Module
        A model, or one layer. Layers that are `PDMultiheadAttention` already get the new spec.
    spec, backend
        As in `PDMultiheadAttention`.
    select : callable, optional
        ``select(name, layer)`` says which layers to convert; by default all.

    Returns
    -------
    Conversion
        What changed, and what did not and why: layers with `add_bias_kv` or `add_zero_attn`,
        subclasses and replaced `forward` methods, whose meaning is their own, and the
        cross-attention of `nn.TransformerDecoderLayer` for specs that go by position.

    Raises
    ------
    SpecError, UnsupportedError, ValueError
        Before anything is changed: for a wrong spec, or one that does not fit the heads of a
        layer that would be converted.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.TransformerEncoderLayer(16, 4, batch_first=True)
    >>> print(convert(model, "bn"))
    converted to softmax+bn
      self_attn
    """
    bound = Bound(spec, backend)
    learned(bound.spec)
    layers: dict[Any, list[str]] = {}
    cross = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            layers.setdefault(module, []).append(name)
        if isinstance(module, nn.TransformerDecoderLayer):
            cross.add(module.multihead_attn)
    by_position = bound.spec.support.restricts or bound.spec.prefix
    chosen, left = {}, {}
    for layer, names in layers.items():
        why = _unconvertible(layer)
        if select is not None and not any(select(name, layer) for name in names):
            why = "not selected"
        elif not why and by_position and layer in cross:
            why = (
                f"cross-attention, whose keys have other positions than its queries, and "
                f"{bound.spec} goes by position; convert it to another spec"
            )
        if why:
            left.update(dict.fromkeys(names, why))
        elif problem := _misfit(bound.spec, layer):
            raise ValueError(f"{problem} of {_shown(names[0])}; nothing was converted")
        else:
            chosen[layer] = names
    parameters = []
    for layer, names in chosen.items():
        _become(layer)
        parameters += [f"{names[0]}.{name}".lstrip(".") for name in _adopt(layer, bound)]
    nested = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.TransformerEncoder)
            and getattr(module, "use_nested_tensor", False)
            and any(layer in chosen for layer in module.modules())
        ):
            module.use_nested_tensor = False
            nested.append(name)
    converted = [name for names in chosen.values() for name in names]
    return Conversion(bound.spec, tuple(converted), left, tuple(nested), tuple(parameters))


def _plain(layer: Any) -> type:
    """Give the class of a layer without what `torch.nn.utils.parametrize` made of it."""
    return type(layer).__mro__[1 if parametrize.is_parametrized(layer) else 0]


def _unconvertible(layer: Any) -> str:
    """Say why a layer must stay as it is, "" if it need not."""
    if "forward" in vars(layer):
        return "its forward was replaced"
    if issubclass(_plain(layer), PDMultiheadAttention):
        return ""
    if _plain(layer) is not nn.MultiheadAttention:
        kind = _plain(layer)
        return f"it is a {kind.__module__}.{kind.__qualname__}, whose meaning is its own"
    for name, used in (
        ("add_bias_kv", layer.bias_k is not None or layer.bias_v is not None),
        ("add_zero_attn", layer.add_zero_attn),
    ):
        if used:
            return f"{name}: {_APPENDED}"
    return ""


def _become(layer: Any) -> None:
    """Change the class of a layer; the object stays."""
    if issubclass(_plain(layer), PDMultiheadAttention):
        return
    kind: type = PDMultiheadAttention
    if parametrize.is_parametrized(layer):  # its class has a property for every such parameter
        own = {k: v for k, v in vars(type(layer)).items() if k not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    layer.__class__ = kind
