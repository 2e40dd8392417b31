"""The specs of a model in its saved config, so that a checkpoint is not loaded as another model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..torch_nn import PDMultiheadAttention, convert

__all__ = [
    "CONVERTED",
    "RECORD",
    "check_record",
    "convert_recorded",
    "registered_spec",
    "specs_in_config",
]

#: The attribute of a config, and the key in its file, with the spec of its attention.
RECORD = "pdcore_spec"
#: The same for the layers that `torch_nn.convert` has converted: a dict from name to spec, or to
#: spec and "output" for layers whose dropout drops outputs.
CONVERTED = "pdcore_converted"
#: The attention of a saved model with converted layers whose other layers do not call pdcore:
#: unknown to transformers, which so refuses the checkpoint where this module is not imported.
REQUIRED = "pdcore_converted"

# Where this module is imported, the other layers have the attention that is the default.
AttentionInterface.register(REQUIRED, AttentionInterface()["sdpa"])
AttentionMaskInterface.register(REQUIRED, AttentionMaskInterface()["sdpa"])


def registered_spec(config: Any) -> str | None:
    """Return the spec of the attention that a config names, None if it is not one of pdcore's."""
    name = getattr(config, "_attn_implementation", None)
    return getattr(AttentionInterface().get(name), "words", None)


def check_record(where: str, spec: str, config: Any) -> None:
    """Raise for a layer whose config says that it was trained with another spec.

    Raises
    ------
    ValueError
        With what to do.
    """
    saved = getattr(config, RECORD, None)
    if saved and saved != spec:
        raise ValueError(
            f"{where}: got the spec {spec}, and the config says that the model was trained with "
            f"{saved}; register that spec, or set {RECORD} of the config to None to change it"
        )


@contextmanager
def specs_in_config(model: Any) -> Iterator[None]:
    """Write the specs of a model into its config and the configs inside it, until the block ends.

    transformers saves the attributes of a config, and takes ``attn_implementation`` of the
    outermost config that it loads as the attention of the model: an error unless the name is
    registered. Nothing is written for ``softmax``, which every attention of transformers computes.
    """
    before: list[tuple[Any, dict[str, Any]]] = []
    converted = _converted_layers(model)

    def write(config: Any) -> Any:
        """Write into a config; return its ``attn_implementation``, None where it needs none."""
        before.append((config, dict(vars(config))))
        parts = {key: getattr(config, key, None) for key in config.sub_configs}
        names = {key: write(part) for key, part in parts.items() if part is not None}
        names = {key: name for key, name in names.items() if name is not None}
        layers = converted.get(id(config))
        if layers or getattr(config, CONVERTED, None):  # the record of a loaded config may be old
            setattr(config, CONVERTED, layers)
        if layers:
            names[""] = REQUIRED
        spec = registered_spec(config)
        if spec is not None and spec != "softmax":
            setattr(config, RECORD, spec)
            names[""] = config._attn_implementation
        result = names.get("") if names.keys() <= {""} else names
        if result is not None:
            config.attn_implementation = result
        return result

    write(model.config)
    _warn_of_other_configs(model, {id(config) for config, _ in before})
    try:
        yield
    finally:
        for config, attributes in reversed(before):  # two parts may share a config
            for key in (RECORD, CONVERTED, "attn_implementation"):
                vars(config).pop(key, None)
                if key in attributes:
                    setattr(config, key, attributes[key])


def _converted_layers(model: nn.Module) -> dict[int, dict[str, Any]]:
    """Return the converted layers, by name, with their records, for each config above them."""
    result: dict[int, dict[str, Any]] = {}
    for prefix, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            for name, layer in part.named_modules(prefix=prefix):
                is_converted = isinstance(layer, PDMultiheadAttention) and layer.converted
                if is_converted and str(layer.spec) != "softmax":
                    spec = str(layer.spec)
                    record = spec if layer.drop == "weights" else [spec, layer.drop]
                    result.setdefault(id(part.config), {})[name] = record
    return result


def _warn_of_other_configs(model: nn.Module, known: set[int]) -> None:
    """Warn of layers whose attention is named by no config that is saved."""
    lost = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        spec = registered_spec(config)
        if spec in (None, "softmax") or id(config) in known:
            continue
        if registered_spec(model.config) != spec:
            lost[name] = spec
    if lost:
        listed = ", ".join(f"{name or 'the model'}: {spec}" for name, spec in lost.items())
        warnings.warn(
            f"save_pretrained: the specs of some layers are in no config that is saved, and the "
            f"checkpoint will be loaded with another attention: {listed}; set the attention of the "
            "whole model",
            stacklevel=4,
        )


def convert_recorded(model: Any) -> None:
    """Convert the layers of a new model that `torch_nn.convert` had converted when it was saved.

    Their names are those of the model that was saved, of which `model` may be a part, or the whole.
    Layers that the class of the model creates as `PDMultiheadAttention` need no record.
    """
    recorded = getattr(model.config, CONVERTED, None) or {}
    for name, layer in model.named_modules():
        if isinstance(layer, PDMultiheadAttention):
            layer.converted = layer.recorded
        elif isinstance(layer, nn.MultiheadAttention):
            for saved, record in recorded.items():
                if f".{name}".endswith(f".{saved}") or f".{saved}".endswith(f".{name}"):
                    spec, drop = (record, None) if isinstance(record, str) else record
                    convert(layer, spec, drop=drop)
                    layer.recorded = True
