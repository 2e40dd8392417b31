"""The attention function that transformers calls in every layer, and its registration."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from pdcore import AttentionSpec, BoundAttention, Exponential, Support, UnsupportedError, bind
from pdcore.extend import Inputs

from ..bound import Choice, refuse_dropout
from ..watching import tell
from .arguments import cast_under_autocast, check_mask, refuse_arguments
from .cache import layer_of
from .masks import Pattern, build_mask
from .record import check_record

__all__ = ["LayerAttention", "register"]


def register(
    name: str = "pdcore",
    spec: str | AttentionSpec = "softmax",
    *,
    backend: Choice = None,
    group: Any = None,
) -> None:
    """Register an attention and its mask function with transformers, by name.

    Afterwards, with ``model.set_attn_implementation(name)``, or ``attn_implementation=name`` at
    loading, the layers of a model compute the attention of `spec`. The properties of a layer are
    added to the spec: causality, a sliding window, the scale of the scores, the softcap, and the
    sinks of its heads (gpt-oss), as ``h(sum,sink=param)``.

    Registering a name again replaces the attention, also in models that use the name already.

    Parameters
    ----------
    name : str
        Letters, digits, ``_`` and ``-``, without "flash", which has a meaning in transformers.
    spec : str or AttentionSpec
        The attention. ``causal`` is added for causal layers; it may be in the spec if every layer
        is causal. A window is intersected with that of the layer. Head scaling has one scale for
        each key head.
    backend : str or sequence of str, optional
        As in `pdcore.bind`; the choice is made by this call.
    group : torch.distributed.ProcessGroup, or DeviceMesh of one dimension, optional
        The processes over which the sequences are cut, as in `pdcore.attention`: ids, the mask
        (B, N), labels and `position_ids` that a rank passes to the model are those of its part.

    Raises
    ------
    ValueError
        For a name that transformers or another library uses, and a spec that makes no sense.
    UnsupportedError
        For a spec with arrays as parameters, ``bn(beta=param)`` or ``bn(statistics=running)``,
        which a function registered by name cannot take.

    Notes
    -----
    A call of a layer raises `UnsupportedError`, or the error in parentheses, for:

    - a spec with statistics of the future in a causal layer; write
      ``causal+bn(statistics=prefix)`` for ``bn``;
    - ``causal`` or prefix statistics in a bidirectional layer;
    - statistics or pooled keys if their keys are not known: with a mask (B, 1, N, M) of the
      caller, with patterns other than causal and sliding windows and packed sequences, with
      packed sequences under `torch.compile`, and with a cache that has dropped keys behind a
      sliding window;
    - a `scaling`, a `softcap` or sinks of the layer that contradict the spec (`ValueError`) or
      that the kernel does not have;
    - arguments that are not supported: paged caches, and the boundaries of packed sequences, which
      are known from `position_ids` that begin anew, without a mask or a cache.

    The attention of queries that see no key, such as padding on the left, is zero.
    """
    known = AttentionInterface().get(name)
    words = str(name).replace("-", "_")
    if not words.isidentifier() or "flash" in words:
        raise ValueError(
            f"name: got {name!r}, expected letters, digits, _ and -, without 'flash', "
            "such as 'pdcore'"
        )
    if name == "eager" or (
        not isinstance(known, LayerAttention)
        and (known is not None or name in AttentionMaskInterface())
    ):
        raise ValueError(
            f"name: got {name!r}, which is an attention of transformers or of another "
            "library; expected a new name, such as 'pdcore'"
        )
    attention = LayerAttention(name, bind(spec, backend=backend), group)
    AttentionInterface.register(name, attention)
    # Without a mask function, transformers builds no mask for the name, and padding would be seen.
    AttentionMaskInterface.register(name, build_mask)


class LayerAttention:
    """The function that transformers calls in every layer, for one spec."""

    def __init__(self, name: str, bound: BoundAttention, group: Any = None) -> None:
        self.name, self.group = name, group
        self.spec = bound.spec
        self.words = str(bound.spec)
        if needed := [p.name for p in self.spec.parameters() if not callable(p.default)]:
            names = ", ".join(needed)
            raise UnsupportedError(
                f"spec: {self.spec} takes the arrays {names}, and an attention that is registered "
                "by name has no place for them; write numbers into the spec"
            )
        # The choice of backend, which all layers share.
        self._choice = bound.choice
        # The arguments of `_bind` for a layer -> the bound spec for such layers, and its name
        # among the attributes of `_layers`, where the compiler can read it.
        self._names: dict[tuple[Any, ...], str] = {}
        self._layers = SimpleNamespace()
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
        position_bias: Any = None,
        s_aux: Any = None,
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
            Bool, True where a query may attend to a key; a float mask is added to log kappa. With
            a mask, `is_causal` and `sliding_window` are ignored.
        dropout : float
            The dropout probability of the weights.
        scaling, softcap : float, optional
            The scale tau of the kernel, and the softcap of the exponential kernel.
        is_causal : bool, optional
            By default `module.is_causal`, or True for a module without this attribute.
        sliding_window : int, optional
            The number of keys that a causal query sees, its own key included.
        position_bias : tensor (B or 1, Hq or 1, N, M), optional
            Added to log kappa, as in T5; the statistics do not depend on it.
        s_aux : tensor (Hq,), optional
            The sinks of the query heads, as in gpt-oss: ``params["sink"]`` of h(sum,sink=param).
        output_attentions : bool, optional
            Return the weights too, without dropout.
        **others
            Must be None, False, or arguments without effect, such as `position_ids`.

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
        refuse_arguments(where, others)
        check_record(where, self.words, getattr(module, "config", None))
        if len(self.spec.heads.scales) not in (0, key.shape[1]):
            index = getattr(module, "layer_idx", None)
            place = where if index is None else f"{where}, layer {index}"
            self.spec.for_heads(key.shape[1], f"key heads of {place}")
        carried = layer_of(key)
        keys = key.shape[-2] if carried is None else carried.keys_of(attention_mask)
        query, key, value = cast_under_autocast(query, key, value)
        arguments: dict[str, Any] = {"offset": keys - query.shape[-2]}
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            if sliding_window is not None and not causal:
                raise UnsupportedError(
                    f"{where}: sliding_window: got {sliding_window} without a mask in a layer that "
                    "looks both ways, where its meaning differs between models; pass a mask"
                )
            pattern = Pattern(
                bool(causal), math.inf if sliding_window is None else sliding_window - 1
            )
        else:
            expected = (query.shape[0], query.shape[1], query.shape[2], keys)
            check_mask(where, attention_mask, expected)
            parts = getattr(attention_mask, "parts", None)
            if parts is not None:
                pattern = parts.pattern
                if parts.dropped and self._needs_keys:
                    raise UnsupportedError(
                        f"{where}: {self.spec} needs every key of the past, and the cache has "
                        "dropped those behind the sliding window; pass "
                        "past_key_values=DynamicCache(), which keeps them, or use_cache=False"
                    )
                arguments["offset"] = parts.offset
                arguments["segments"] = parts.segments
                if parts.key_mask is not None:
                    arguments["key_mask"] = parts.key_mask.expand(expected[0], -1)
            else:
                pattern = None
                kind = "mask" if attention_mask.dtype == torch.bool else "bias"
                arguments[kind] = attention_mask
        if position_bias is not None:
            bias = arguments.get("bias")
            arguments["bias"] = position_bias if bias is None else bias + position_bias
        if s_aux is not None:
            arguments["params"] = {"sink": s_aux}
        if self.group is not None:
            arguments["group"] = self.group
            # Padding may be on some ranks only, and every rank has to make the same call.
            every = torch.ones(key.shape[0], keys, dtype=torch.bool, device=key.device)
            arguments.setdefault("key_mask", every)
        layer = (pattern and tuple(pattern), scaling, softcap, query.shape[-1], s_aux is not None)
        bound = getattr(self._layers, self._bind(where, *layer))
        if carried is not None:
            arguments |= {"dropout": dropout or None, "weights": output_attentions or None}
            out = carried.attend(bound, query, key, value, arguments, where)
            return out.transpose(1, 2).contiguous(), None
        weights, inputs = None, Inputs(query, key, value, **arguments)
        if output_attentions:
            weights = bound.weights(inputs)
        if dropout:  # omitted if 0, so that its value is not compared
            refuse_dropout(self.spec, "dropout", dropout, "0 in the config of the model", where)
            arguments["dropout"] = dropout
        out = bound(query, key, value, **arguments)
        tell(module, bound, inputs, out, "bhnd")
        return out.transpose(1, 2).contiguous(), weights

    def _bind(
        self,
        where: str,
        pattern: tuple[Any, ...] | None,
        scaling: float | None,
        softcap: float | None,
        dim: int,
        sinks: bool,
    ) -> str:
        """Bind the spec for layers of equal properties, see `register`; return its name.

        The pattern is a plain tuple, since the compiler does not pass on one with names.
        """
        layer = (pattern, scaling, softcap, dim, sinks)
        name = self._names.get(layer)
        if name is None:
            try:
                kernel = _kernel(self.spec, scaling, softcap, dim)
                support = self._support(Pattern(*pattern) if pattern else None)
                sink = self._sink(sinks)
                spec = replace(self.spec, kernel=kernel, support=support, sink=sink)
            except (ValueError, UnsupportedError) as error:
                raise type(error)(f"{where}: {error}") from error
            name = f"layer_{len(self._names)}"
            setattr(self._layers, name, bind(spec, backend=self._choice))
            self._names[layer] = name
        return name

    # The compiler calls the method, and does not trace it.
    _bind._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _sink(self, given: bool) -> float | str | None:
        """Return the sink of the spec, or that of a layer which has sinks."""
        if given and self.spec.sink is not None:
            raise ValueError(
                f"s_aux: got sinks from the layer, and the spec {self.spec} says "
                f"sink={self.spec.sink:g}; leave it out of the spec"
            )
        return "param" if given else self.spec.sink

    def _support(self, pattern: Pattern | None) -> Support:
        """Intersect the support of the spec with that of a layer."""
        spec, support = self.spec, self.spec.support
        if pattern is None:
            if self._needs_keys or support.restricts:
                raise UnsupportedError(
                    f"attention_mask: {spec} needs to know padding and positions, which a mask "
                    "(B, 1, N, M) does not tell apart; pass a mask (B, M) to the model, without "
                    "packed sequences; a compiled model needs one even if nothing is padded"
                )
            return support
        if not pattern.causal and (support.causal or spec.prefix):
            raise UnsupportedError(
                f"{spec} is causal, and this layer looks both ways: leave causal out, and use bn "
                "for bn(statistics=prefix); causality comes from the model"
            )
        if pattern.causal and not support.causal and spec.normalization.leaks:
            raise UnsupportedError(
                f"{spec} takes statistics over keys of the future, and this layer is causal: "
                "register causal+bn(statistics=prefix), or permit it with bn(allow_leak=true)"
            )
        right = min(support.right, pattern.right)
        if pattern.causal and pattern.left != math.inf:
            right = 0  # no effect, but lets the spec refuse pooled keys wider than the window
        return Support(pattern.causal, min(support.left, pattern.left), right)


def _kernel(spec: AttentionSpec, scaling: float | None, softcap: float | None, dim: int) -> Any:
    """Return the kernel of a spec with the scale and the softcap of a layer."""
    kernel: Any = spec.kernel
    if scaling is not None:
        # Whether the kernel has a field `scale` whose default stands for 1/sqrt(D).
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
