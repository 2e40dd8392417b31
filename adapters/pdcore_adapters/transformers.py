"""pdcore attention in the models of Hugging Face transformers, version 5.

>>> from pdcore_adapters.transformers import register
>>> register("pdcore", "softmax")
>>> model.set_attn_implementation("pdcore")  # doctest: +SKIP

transformers makes the mask of a forward pass once, from the padding, the cache and the pattern of
the layers, and hands it to the attention of every layer. A boolean mask (B, 1, N, M) would hide
from pdcore what it is made of, and statistics have to tell padding from causality. So the mask
function registered here gives a `LayerMask`: the parts, which turn into the boolean mask as soon
as anything else computes with it.

Notation: B sequences, Hq query heads, Hkv key heads, N queries, M keys, cached ones included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from pdcore import AttentionSpec, BoundAttention, Exponential, Support, UnsupportedError, bind
from pdcore.extend import Inputs

__all__ = ["LayerMask", "register"]

Choice = str | Sequence[str] | None

#: What models pass to every attention although it changes nothing there.
_HARMLESS = frozenset(
    {
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)

#: What to do about some of the others.
_INSTEAD = {
    "cache": "pages of keys belong to continuous batching; use generate() with a DynamicCache",
    "cu_seq_lens_k": "pad the sequences of a batch instead of packing them",
    "cu_seq_lens_q": "pad the sequences of a batch instead of packing them",
    "position_bias": "use 'eager' for a model with biased scores",
    "s_aux": "use 'eager' for a model with attention sinks",
    "sinks": "use 'eager' for a model with attention sinks",
}


def register(
    name: str = "pdcore", spec: str | AttentionSpec = "softmax", *, backend: Choice = None
) -> None:
    """Give transformers an attention by name, with the mask function that belongs to it.

    Afterwards ``model.set_attn_implementation(name)`` or ``attn_implementation=name`` at loading
    lets the layers of a model compute the attention of `spec`. What a layer says itself is added
    to the spec: causality, a sliding window, the scale of the scores and their softcap.

    A name that was registered here before is replaced, also for the models that use it already.

    Parameters
    ----------
    name : str
        Letters, digits, ``_`` and ``-``, without "flash", which transformers reads a meaning into.
    spec : str or AttentionSpec
        The attention. ``causal`` may be written where every layer is causal; it is added to such
        layers anyway. A window is intersected with the layer's own. Head scaling has one scale
        for each key head.
    backend : str or sequence of str, optional
        As in `pdcore.bind`, settled now.

    Raises
    ------
    ValueError
        For a name that transformers or somebody else has given a meaning, and a spec that makes
        no sense.
    UnsupportedError
        For a spec with arrays as parameters, ``bn(beta=param)`` or ``bn(statistics=running)``: a
        function that is registered by name has no place for them.

    Notes
    -----
    A call of a layer refuses, with `UnsupportedError` unless said otherwise:

    - a spec whose statistics see the future, in a causal layer: ``bn`` there is
      ``causal+bn(statistics=prefix)``;
    - ``causal`` or prefix statistics in a layer that looks both ways;
    - statistics or pooled keys where their keys are not known: with a mask (B, 1, N, M) made by
      the caller, with packed sequences and other patterns beyond causal and sliding windows,
      under `torch.compile`, and with a cache that has dropped keys behind a sliding window;
    - a `scaling` or `softcap` of the layer that the spec contradicts (`ValueError`) or that its
      kernel does not have;
    - arguments that it does not honour: learned position biases, attention sinks, paged caches,
      packed sequences.

    Queries that see no key, those of padding on the left, get zeros.
    """
    known = AttentionInterface().get(name)
    words = str(name).replace("-", "_")
    if not words.isidentifier() or "flash" in words:
        raise ValueError(
            f"name: got {name!r}, expected letters, digits, _ and -, without 'flash', "
            "such as 'pdcore'"
        )
    if name == "eager" or (
        not isinstance(known, _Attention)
        and (known is not None or name in AttentionMaskInterface())
    ):
        raise ValueError(
            f"name: got {name!r}, which is an attention of transformers or of another "
            "library; expected a new name, such as 'pdcore'"
        )
    attention = _Attention(name, bind(spec, backend=backend))
    AttentionInterface.register(name, attention)
    # Without it transformers makes no mask for the name, and padding would be seen.
    AttentionMaskInterface.register(name, _layer_mask)


# --- masks ----------------------------------------------------------------------------------------


class _Pattern(NamedTuple):
    """Which positions the queries of a layer see: the fields of `Support`."""

    causal: bool = False
    left: float = math.inf
    right: float = math.inf


class LayerMask(torch.Tensor):  # type: ignore[misc]
    """A boolean mask (B, 1, N, M) that is kept as its parts.

    Every operation on it, apart from its shape, dtype and device, is on the full mask, which is
    built at the first one. So a model that cuts or combines its masks computes what it always
    did, though statistics no longer know their keys then.

    Attributes
    ----------
    pattern : tuple
        Causal, left, right: as `pdcore.Support`.
    key_mask : bool tensor (B, M) or None
        True for a real key.
    offset : int or integer tensor ()
        The position of the first query among these M keys.
    dropped : bool
        Whether the cache has dropped keys that came before them.
    """

    pattern: _Pattern
    key_mask: Any
    offset: Any
    dropped: bool
    _full: Callable[[], Any]
    _built: Any

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        device: Any,
        pattern: _Pattern,
        key_mask: Any,
        offset: Any,
        dropped: bool,
        full: Callable[[], Any],
    ) -> LayerMask:
        """Wrap the parts of a mask; `full` builds the whole."""
        mask: LayerMask = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.bool, device=device
        )
        mask.pattern, mask.key_mask, mask.offset = pattern, key_mask, offset
        mask.dropped, mask._full, mask._built = dropped, full, None
        return mask

    def full(self) -> Any:
        """Build the mask as a plain tensor (B, 1, N, M)."""
        if self._built is None:
            self._built = self._full()
        return self._built

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LayerMask({tuple(self.shape)}, {self.pattern}, offset={self.offset})"

    # Results of operations are plain tensors, not masks without their parts.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Checkpoints of activations detach what they keep.
        if func is torch.ops.aten.detach.default:
            mask = args[0]
            return cls(
                mask.shape,
                mask.device,
                mask.pattern,
                mask.key_mask,
                mask.offset,
                mask.dropped,
                mask.full,
            )
        args, kwargs = tree_map(lambda x: x.full() if type(x) is cls else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def _layer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    *,
    use_vmap: bool = False,
    device: Any = "cpu",
    **others: Any,
) -> Any:
    """Make the mask of a kind of layers, as `transformers.masking_utils.sdpa_mask` does.

    Never None, even where nothing is masked: None would leave it to the attention to guess.

    Returns
    -------
    LayerMask or bool tensor (B, 1, N, M)
        The latter for patterns other than causal, sliding and bidirectional ones.
    """
    # A static cache counts its keys in place, before the attention sees them: not its own tensor.
    offset = q_offset.reshape(()).clone() if isinstance(q_offset, torch.Tensor) else q_offset

    def full() -> Any:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )

    pattern = _recognise(mask_function)
    # The compiler has no notion of a tensor that is not there yet.
    if pattern is None or torch.compiler.is_compiling():
        return full()
    # Padded to the length of a static cache, whose last entries are not written yet.
    key_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if key_mask is not None:
        key_mask = key_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        # Asked once in a forward pass, where every layer would pay for a mask that hides nothing.
        if bool(key_mask.all()):
            key_mask = None
    return LayerMask(
        (batch_size, 1, q_length, kv_length),
        device,
        pattern,
        key_mask,
        offset - kv_offset,
        kv_offset > 0,
        full,
    )


def _recognise(mask_function: Any) -> _Pattern | None:
    """Read a pattern off a mask function of transformers; None if it is another one.

    The functions are closures, known by the names of what makes them. One that this does not
    know, in whatever release, is not guessed at.
    """
    if mask_function is causal_mask_function:
        return _Pattern(causal=True)
    if mask_function is bidirectional_mask_function:
        return _Pattern()
    code = getattr(mask_function, "__code__", None)
    if getattr(mask_function, "__module__", None) != sdpa_mask.__module__ or code is None:
        return None
    cells = (cell.cell_contents for cell in mask_function.__closure__ or ())
    enclosed = dict(zip(code.co_freevars, cells, strict=True))
    match mask_function.__qualname__.partition(".")[0], enclosed:
        case "and_masks", {"mask_functions": parts}:
            patterns = [_recognise(part) for part in parts]
            known = [pattern for pattern in patterns if pattern is not None]
            if len(known) < len(patterns):
                return None
            causal, left, right = zip(*known, strict=True)
            return _Pattern(any(causal), min(left), min(right))
        case "sliding_window_overlay", {"sliding_window": int(width)}:
            return _Pattern(left=width - 1)  # the query's own key is one of them
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(width)}:
            return _Pattern(left=width, right=width)
    return None


# --- attention ------------------------------------------------------------------------------------


class _Attention:
    """The function that transformers calls in every layer, for one spec."""

    def __init__(self, name: str, bound: BoundAttention) -> None:
        self.name = name
        self.spec = bound.spec
        if self.spec.parameters():
            names = ", ".join(p.name for p in self.spec.parameters())
            raise UnsupportedError(
                f"spec: {self.spec} takes the arrays {names}, and an attention that is registered "
                "by name has no place for them; write numbers into the spec"
            )
        # All the layers share the choice of backend, made now.
        self._choice = bound.choice
        # What differs between layers -> the spec with it, bound.
        self._layers: dict[tuple[Any, ...], BoundAttention] = {}
        heads, normalization = self.spec.heads, self.spec.normalization
        self._needs_keys = heads.largest > 1 or normalization.statistics_state() is not None

    def __repr__(self) -> str:
        return f"<pdcore attention {self.name!r}: {self.spec}>"

    def __call__(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        *,
        softcap: float | None = None,
        sliding_window: int | None = None,
        output_attentions: bool | None = None,
        **others: Any,
    ) -> tuple[Any, Any]:
        """Compute the attention of a layer.

        Parameters
        ----------
        module : torch.nn.Module
            The layer.
        query : tensor (B, Hq, N, D)
        key : tensor (B, Hkv, M, D)
        value : tensor (B, Hkv, M, Dv)
        attention_mask : LayerMask, tensor (B or 1, Hq or 1, N, M) or None
            Bool, True where a query may attend; a float one is added to log kappa. It says all
            about who attends to whom. None leaves that to the two arguments below.
        dropout : float
            Of the weights.
        scaling, softcap : float, optional
            The scale tau of the kernel, and the softcap of the exponential kernel.
        is_causal : bool, optional
            `module.is_causal` by default, else True. Not read when there is a mask.
        sliding_window : int, optional
            How many keys a causal query sees, its own included. Not read when there is a mask,
            which contains it.
        output_attentions : bool, optional
            Return the weights too; they are those without dropout.
        **others
            Nothing but None, False, and what changes nothing here, such as `position_ids`.

        Returns
        -------
        out : tensor (B, N, Hq, Dv)
        weights : tensor (B, Hq, N, M) or None

        Raises
        ------
        TypeError, ValueError, UnsupportedError
            As `register` says.
        """
        where = f"{type(module).__name__} with {self.name!r}"
        _refuse(where, others)
        query, key, value = _one_dtype(query, key, value)
        arguments: dict[str, Any] = {"offset": key.shape[-2] - query.shape[-2]}
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            if sliding_window is not None and not causal:
                raise UnsupportedError(
                    f"{where}: sliding_window: got {sliding_window} without a mask in a layer that "
                    "looks both ways, where its meaning differs between models; pass a mask"
                )
            pattern = _Pattern(
                bool(causal), math.inf if sliding_window is None else sliding_window - 1
            )
        else:
            expected = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            _check_mask(where, attention_mask, expected)
            if isinstance(attention_mask, LayerMask):
                pattern = attention_mask.pattern
                if attention_mask.dropped and self._needs_keys:
                    raise UnsupportedError(
                        f"{where}: {self.spec} needs every key of the past, and the cache has "
                        "dropped those behind the sliding window; pass "
                        "past_key_values=DynamicCache(), which keeps them, or use_cache=False"
                    )
                arguments["offset"] = attention_mask.offset
                arguments["key_mask"] = attention_mask.key_mask
                if attention_mask.key_mask is not None:
                    arguments["key_mask"] = attention_mask.key_mask.expand(expected[0], -1)
            else:
                pattern = None
                kind = "mask" if attention_mask.dtype == torch.bool else "bias"
                arguments[kind] = attention_mask
        bound = self._bound(where, pattern, scaling, softcap, query.shape[-1])
        weights = None
        if output_attentions:
            weights = bound.weights(Inputs(query, key, value, **arguments))
        if dropout:  # left out, it is known to be none without a look at its value
            arguments["dropout"] = dropout
        out = bound(query, key, value, **arguments)
        return out.transpose(1, 2).contiguous(), weights

    def _bound(
        self,
        where: str,
        pattern: _Pattern | None,
        scaling: float | None,
        softcap: float | None,
        dim: int,
    ) -> BoundAttention:
        """Give the spec bound for the layers that are alike."""
        layer = (pattern, scaling, softcap, dim)
        bound = self._layers.get(layer)
        if bound is None:
            try:
                kernel = _kernel(self.spec, scaling, softcap, dim)
                support = self._support(pattern)
                spec = replace(self.spec, kernel=kernel, support=support)
            except (ValueError, UnsupportedError) as error:
                raise type(error)(f"{where}: {error}") from error
            bound = self._layers[layer] = bind(spec, backend=self._choice)
        return bound

    def _support(self, pattern: _Pattern | None) -> Support:
        """Intersect the support of the spec with that of a layer."""
        spec, own = self.spec, self.spec.support
        if pattern is None:
            if self._needs_keys or own.restricts:
                raise UnsupportedError(
                    f"attention_mask: {spec} needs to know padding and positions, which a mask "
                    "(B, 1, N, M) does not tell apart; pass a mask (B, M) to the model, without "
                    "packed sequences, and do not compile it"
                )
            return own
        if not pattern.causal and (own.causal or spec.prefix):
            raise UnsupportedError(
                f"{spec} is causal, and this layer looks both ways: leave causal out, and use bn "
                "for bn(statistics=prefix); causality comes from the model"
            )
        if pattern.causal and not own.causal and spec.normalization.leaks:
            raise UnsupportedError(
                f"{spec} takes statistics over keys of the future, and this layer is causal: "
                "register causal+bn(statistics=prefix), or permit it with bn(allow_leak=true)"
            )
        right = min(own.right, pattern.right)
        if pattern.causal and pattern.left != math.inf:
            right = 0  # says how narrow the window is: pooled keys that never fit are refused
        return Support(pattern.causal, min(own.left, pattern.left), right)


def _kernel(spec: AttentionSpec, scaling: float | None, softcap: float | None, dim: int) -> Any:
    """Give the kernel of a spec the scale and the softcap of a layer."""
    kernel: Any = spec.kernel
    if scaling is not None:
        # Kernels with a tau that stands for 1/sqrt(D) unless it is given.
        scalable = any(f.name == "scale" and f.default is None for f in fields(kernel))
        if scalable and kernel.scale is None:
            kernel = replace(kernel, scale=float(scaling))
        elif scalable and not math.isclose(kernel.scale, scaling, rel_tol=1e-6):
            raise ValueError(
                f"scaling: got {scaling:.6g} from the layer, and the spec {spec} says "
                f"scale={kernel.scale:.6g}; leave scale out of the spec, or set the scaling of "
                "the layers to it"
            )
        elif not scalable and not math.isclose(scaling, dim**-0.5, rel_tol=1e-6):
            raise UnsupportedError(
                f"scaling: got {scaling:.6g}, and {kernel.word} has no scale to set; expected "
                f"1/sqrt(D) = {dim**-0.5:.6g}, which says nothing of its own, or None"
            )
    if softcap is not None:
        if not isinstance(kernel, Exponential):
            raise UnsupportedError(
                f"softcap: got {softcap:g}, and {kernel.word} has none; use softmax for this model"
            )
        if kernel.softcap not in (None, softcap):
            raise ValueError(
                f"softcap: got {softcap:g} from the layer, and the spec {spec} says "
                f"{kernel.softcap:g}; leave it out of the spec"
            )
        kernel = replace(kernel, softcap=float(softcap))
    return kernel


def _refuse(where: str, others: Mapping[str, Any]) -> None:
    """Refuse arguments that would have to be honoured."""
    for name, given in others.items():
        if given is None or given is False or name in _HARMLESS:
            continue
        instead = _INSTEAD.get(name, "use 'eager' for this model")
        raise UnsupportedError(
            f"{where}: {name}: got a {type(given).__name__}, expected None, "
            f"since it is not honoured; {instead}"
        )


def _check_mask(where: str, mask: Any, expected: tuple[int, ...]) -> None:
    """Check that a mask is what `AttentionMaskInterface` or a caller may give."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(
            f"{where}: attention_mask: got {type(mask).__name__}, expected a tensor "
            f"that broadcasts to {expected}, or None"
        )
    fits = mask.ndim == 4 and all(
        have in (1, want) for have, want in zip(mask.shape[:2], expected[:2], strict=True)
    )
    if not fits or tuple(mask.shape[2:]) != expected[2:]:
        raise ValueError(
            f"{where}: attention_mask: got shape {tuple(mask.shape)}, expected one "
            f"that broadcasts to {expected}"
        )


def _one_dtype(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Bring q, k and v to one dtype under autocast, as PyTorch's own attention does."""
    if query.dtype == key.dtype == value.dtype:
        return query, key, value
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value  # refused by pdcore, in its words
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)
