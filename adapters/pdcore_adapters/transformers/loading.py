"""What happens when a model of transformers is created, given its attention, and saved.

transformers calls nothing of a registered attention before the first forward pass, and nothing
when it saves. So importing `pdcore_adapters.transformers` wraps three methods of `PreTrainedModel`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pdcore import UnsupportedError, parse

from ..bound import refuse_dropout
from ..torch_nn import PDMultiheadAttention
from .check import attends_by_itself, check
from .record import RECORD, convert_recorded, registered_spec, specs_in_config

__all__ = ["wrap_methods"]


def wrap_methods() -> None:
    """Wrap the methods of `PreTrainedModel` that create a model, set its attention, and save it."""
    created, given, saved = (
        getattr(PreTrainedModel, name)
        for name in ("post_init", "set_attn_implementation", "save_pretrained")
    )

    @functools.wraps(created)
    def post_init(self: Any) -> None:
        created(self)
        convert_recorded(self)
        check_model(self)

    @functools.wraps(given)
    def set_attn_implementation(self: Any, *arguments: Any, **options: Any) -> None:
        given(self, *arguments, **options)
        for model in self.modules():
            if isinstance(model, PreTrainedModel):
                check_model(model)

    @functools.wraps(saved)
    def save_pretrained(self: Any, *arguments: Any, **options: Any) -> Any:
        with specs_in_config(self):
            return saved(self, *arguments, **options)

    PreTrainedModel.post_init = post_init
    PreTrainedModel.set_attn_implementation = set_attn_implementation
    PreTrainedModel.save_pretrained = save_pretrained


def check_model(model: Any) -> None:
    """Say which layers of a model will not attend by the spec that its config names.

    Models inside the model have been checked before.

    Raises
    ------
    UnsupportedError
        If none of the layers will, and for dropout with a spec that has no weights to drop.

    Warns
    -----
    UserWarning
        If some of the layers will not, and if the config has a record of a spec and names another
        attention.
    """
    config = model.config
    spec = registered_spec(config)
    kind = getattr(config, "model_type", None) or type(config).__name__
    if spec is None:
        if saved := getattr(config, RECORD, None):
            warnings.warn(
                f"{kind}: its config says that the model was trained with the spec {saved}, and "
                f"its attention is {config._attn_implementation!r}; register the spec and pass "
                f"attn_implementation=, or set {RECORD} of the config to None to change it",
                stacklevel=4,
            )
        return
    for argument, p in _dropouts(config):
        refuse_dropout(parse(spec), argument, p, f"{argument}=0 to the config", kind)
    own = {name: type(layer).__name__ for name, layer in _own_layers(model)}
    if not own:
        return
    classes = ", ".join(sorted(set(own.values())))
    if not check(model).calls:
        raise UnsupportedError(
            f"{kind}: computes its attention itself and never calls pdcore: its layers are "
            f"{classes}; use 'eager' for this model, in a model of several configs for its part, "
            "as in attn_implementation={'text_config': 'pdcore', 'vision_config': 'eager'}"
        )
    warnings.warn(
        f"{kind}: these layers attend by themselves and do not call pdcore, whatever the config "
        f"says: {classes} ({', '.join(own)}); pdcore_adapters.transformers.check(model) lists all",
        stacklevel=4,
    )


def _own_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of a model that attend by themselves, without those of models inside it."""
    for name, part in model.named_children():
        if isinstance(part, PreTrainedModel | PDMultiheadAttention):
            continue
        if isinstance(part, nn.MultiheadAttention) or attends_by_itself(part):
            yield prefix + name, part
        yield from _own_layers(part, f"{prefix}{name}.")


def _dropouts(config: Any) -> Iterator[tuple[str, float]]:
    """Yield the options of a config for the dropout of attention weights, above 0."""
    for name, value in vars(config).items():
        of_attention = name.startswith("att") and ("drop" in name)
        if of_attention and isinstance(value, int | float) and value:
            yield name, value
