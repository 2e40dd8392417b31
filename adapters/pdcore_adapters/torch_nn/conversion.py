"""`convert`, which changes the `nn.MultiheadAttention` layers of a model in place."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from pdcore import AttentionSpec
from pdcore.extend import finite_dropout

from ..bound import (
    MOMENTUM,
    BoundSpec,
    Choice,
    Drop,
    check_drop,
    check_running,
    kept_arrays,
    refuse_dropout,
)
from .layer import PDMultiheadAttention
from .state import attach_spec
from .words import APPENDED_KEY

__all__ = ["Conversion", "convert"]


@dataclass(frozen=True, repr=False)
class Conversion:
    """The changes that `convert` made to a model; prints as text.

    Attributes
    ----------
    spec : AttentionSpec
        The attention of the converted layers.
    converted : tuple of str
        The names of the converted layers, as in `named_modules`; a shared layer has several.
    left : dict of str to str
        The attention layers that were not converted, each with the reason.
    nested : tuple of str
        Encoders in which nested tensors were turned off.
    parameters : tuple of str
        The names of new parameters, which an existing optimizer does not have.
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
            (
                "left as it was",
                [f"{_display_name(name)}: {why}" for name, why in self.left.items()],
            ),
            ("nested tensors turned off, which would pass the layers by", self.nested),
            ("new parameters, for the optimizer", self.parameters),
        ]
        lines = []
        for title, entries in parts:
            if entries:
                lines += [title, *(f"  {_display_name(entry)}" for entry in entries)]
        return "\n".join(lines)

    __repr__ = __str__


def _display_name(name: str) -> str:
    """Return the name of a module for messages."""
    return name or "the model itself"


def convert(
    model: nn.Module,
    spec: str | AttentionSpec,
    *,
    backend: Choice = None,
    select: Callable[[str, nn.MultiheadAttention], bool] | None = None,
    dropout: float | None = None,
    drop: Drop | None = None,
    momentum: float | None = MOMENTUM,
    process_group: Any = None,
    group: Any = None,
) -> Conversion:
    """Change every `nn.MultiheadAttention` of a model to a `PDMultiheadAttention`, in place.

    The modules stay the same objects, with the same parameters, hooks, mode and names, so
    optimizers and shared modules remain valid.

    Parameters
    ----------
    model : nn.Module
        A model, or one layer. Layers that are `PDMultiheadAttention` already get the new spec.
    spec, backend, momentum, process_group, group
        As in `PDMultiheadAttention`.
    select : callable, optional
        ``select(name, layer)`` says which layers to convert; by default all.
    dropout : float, optional
        The dropout of the converted layers; by default that of each layer.
    drop : {"weights", "output"}, optional
        What it drops, see `PDMultiheadAttention`; by default what each layer drops. A feature map,
        such as ``linear``, has no weights to drop.

    Returns
    -------
    Conversion
        The converted layers, and those that were left with the reason: layers with `add_bias_kv` or
        `add_zero_attn`, subclasses and layers with a replaced `forward`, whose meaning is unknown,
        and cross-attention of `nn.TransformerDecoderLayer` for specs that depend on positions.

    Raises
    ------
    SpecError, UnsupportedError, ValueError
        For a wrong spec, or one that does not fit the heads of a layer that would be converted;
        the model is then unchanged. Dropout of the weights is refused for a feature map.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.TransformerEncoderLayer(16, 4, batch_first=True)
    >>> print(convert(model, "bn"))
    converted to softmax+bn
      self_attn
    """
    bound = BoundSpec(spec, backend)
    kept_arrays(bound.spec)
    if drop is not None:
        check_drop(drop)
    check_running(bound.spec, momentum, process_group=process_group)
    layers: dict[Any, list[str]] = {}
    cross = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            layers.setdefault(module, []).append(name)
        if isinstance(module, nn.TransformerDecoderLayer):
            cross.add(module.multihead_attn)
    by_position = bound.spec.support.restricts or bound.spec.prefix
    selected, left = {}, {}
    for layer, names in layers.items():
        why = _reason_to_leave(layer)
        if select is not None and not any(select(name, layer) for name in names):
            why = "not selected"
        elif not why and by_position and layer in cross:
            why = (
                f"cross-attention, whose keys have other positions than its queries, and "
                f"{bound.spec} goes by position; convert it to another spec"
            )
        if why:
            left.update(dict.fromkeys(names, why))
        else:
            owner = f"heads of {_display_name(names[0])}; nothing was converted"
            bound.spec.for_heads(layer.num_heads, owner)
            p = layer.dropout if dropout is None else dropout
            if (drop or getattr(layer, "drop", "weights")) == "weights":
                refuse_dropout(bound.spec, "dropout", p, _NO_WEIGHTS, _display_name(names[0]))
            selected[layer] = names
    parameters = []
    for layer, names in selected.items():
        if dropout is not None:
            layer.dropout = finite_dropout(dropout)
        _convert_layer(layer)
        if drop is not None:
            layer.drop = drop
        layer.converted = True
        new = attach_spec(layer, bound, momentum, process_group, group)
        parameters += [f"{names[0]}.{name}".lstrip(".") for name in new]
    _let_transformers_save(model)
    nested = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.TransformerEncoder)
            and getattr(module, "use_nested_tensor", False)
            and any(layer in selected for layer in module.modules())
        ):
            module.use_nested_tensor = False
            nested.append(name)
    converted = [name for names in selected.values() for name in names]
    return Conversion(bound.spec, tuple(converted), left, tuple(nested), tuple(parameters))


_NO_WEIGHTS = (
    "convert(drop='output') to drop outputs of the layer in their place, or convert(dropout=0); "
    "nothing was converted"
)


def _let_transformers_save(model: nn.Module) -> None:
    """Let a model of Hugging Face transformers save the specs of its converted layers."""
    transformers = sys.modules.get("transformers")
    if transformers and any(isinstance(m, transformers.PreTrainedModel) for m in model.modules()):
        importlib.import_module("pdcore_adapters.transformers")


def _unparametrized_class(layer: Any) -> type:
    """Return the class that a layer has without `torch.nn.utils.parametrize`."""
    return type(layer).__mro__[1 if parametrize.is_parametrized(layer) else 0]


def _reason_to_leave(layer: Any) -> str:
    """Return why a layer cannot be converted, empty if it can."""
    if "forward" in vars(layer):
        return "its forward was replaced"
    if issubclass(_unparametrized_class(layer), PDMultiheadAttention):
        return ""
    if _unparametrized_class(layer) is not nn.MultiheadAttention:
        kind = _unparametrized_class(layer)
        return f"it is a {kind.__module__}.{kind.__qualname__}, whose meaning is its own"
    for name, used in (
        ("add_bias_kv", layer.bias_k is not None or layer.bias_v is not None),
        ("add_zero_attn", layer.add_zero_attn),
    ):
        if used:
            return f"{name}: {APPENDED_KEY}"
    return ""


def _convert_layer(layer: Any) -> None:
    """Change the class of a layer, in place."""
    if issubclass(_unparametrized_class(layer), PDMultiheadAttention):
        return
    kind: type = PDMultiheadAttention
    if parametrize.is_parametrized(layer):  # the class has a property for each parameter
        attributes = {
            k: v for k, v in vars(type(layer)).items() if k not in ("__dict__", "__weakref__")
        }
        kind = type(f"Parametrized{kind.__name__}", (kind,), attributes)
    layer.__class__ = kind
