"""The layers of a model that call pdcore, and those that attend by themselves."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..torch_nn import PDMultiheadAttention
from .record import RECORD, registered_spec

__all__ = ["Check", "attends_by_itself", "check", "own_attention"]

#: The name by which the layers of transformers look their attention function up.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True, repr=False)
class Check:
    """The attention layers of a model; prints as text.

    Attributes
    ----------
    calls : dict of str to str
        The layers that call pdcore, each with the spec.
    others : dict of str to str
        The attention layers that do not, each with the reason.
    """

    calls: dict[str, str]
    others: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for title, layers in (("call pdcore", self.calls), ("do not call pdcore", self.others)):
            if layers:
                lines += [title, *(f"  {name}: {text}" for name, text in layers.items())]
        return "\n".join(lines) or "the model has no attention layers that are known"

    __repr__ = __str__


def check(model: nn.Module) -> Check:
    """Return which attention layers of a model call pdcore, without running the model.

    A layer calls pdcore if its class looks its attention up in transformers' attention interface,
    and its config names a registered attention, or if it is a `PDMultiheadAttention`. A class named
    "Attention" that never looks it up, and either computes a softmax or contains no other class of
    that name, attends by itself, whatever the config says; so does an `nn.MultiheadAttention`.

    Parameters
    ----------
    model : torch.nn.Module
        A model of transformers.

    Returns
    -------
    Check
        Every layer that attends is in `calls` or in `others`.
    """
    calls, others = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, PDMultiheadAttention):
            calls[name] = str(module.spec)
        elif isinstance(module, nn.MultiheadAttention):
            others[name] = (
                "torch.nn.MultiheadAttention attends by itself; "
                "pdcore_adapters.torch_nn.convert changes it"
            )
        elif attends_by_itself(module):
            others[name] = f"{type(module).__name__} attends by itself"
        elif _by_interface(type(module)):
            config = getattr(module, "config", None)
            if (spec := registered_spec(config)) is not None:
                calls[name] = spec
                continue
            others[name] = f"its attention is {getattr(config, '_attn_implementation', None)!r}"
            if saved := getattr(config, RECORD, None):
                others[name] += f", and the model was saved with the spec {saved}"
    return Check(calls, others)


def attends_by_itself(module: nn.Module) -> bool:
    """Return whether a layer of transformers attends, and does not call the interface."""
    kind = type(module)
    by_interface = _by_interface(kind)
    if by_interface is not None or not _is_named_attention(kind):
        return by_interface is False
    inner = (type(part) for part in module.modules() if part is not module)
    return not any(
        issubclass(part, nn.MultiheadAttention) or _is_named_attention(part) for part in inner
    )


def _is_named_attention(kind: type) -> bool:
    return "attention" in kind.__name__.lower() and not issubclass(kind, PreTrainedModel)


@functools.cache
def own_attention(module: str) -> tuple[str, ...]:
    """Return the attention classes of an architecture if none of them calls the interface.

    Parameters
    ----------
    module : str
        The name of the module that defines the config of the architecture.
    """
    start = module.rpartition(".")[0] + ".modeling_"
    kinds = [
        kind
        for name, modeling in list(sys.modules.items())
        if name.startswith(start)
        for kind in vars(modeling).values()
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == name
    ]
    answers = {kind.__name__: _by_interface(kind) for kind in kinds}
    if True in answers.values():
        return ()
    return tuple(name for name, answer in answers.items() if answer is False)


def _by_interface(kind: type) -> bool | None:
    """Return whether a class attends by the interface, None if it does not attend."""
    if issubclass(kind, PreTrainedModel):  # whose own methods name the interface
        return None
    names = set(_names(kind))
    if _INTERFACE in names:
        return True
    softmax = any("softmax" in name.lower() or "dot_product" in name for name in names)
    return False if softmax and _is_named_attention(kind) else None


def _names(kind: type) -> Iterator[str]:
    """Return the global names and attributes in the methods of a class."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch."):
            return
        for function in vars(base).values():
            if isinstance(function, (staticmethod, classmethod)):
                function = function.__func__
            code = (
                getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            )
            if isinstance(code, CodeType):
                yield from _code_names(code)


def _code_names(code: Any) -> Iterator[str]:
    if isinstance(code, CodeType):
        yield from code.co_names
        for constant in code.co_consts:
            yield from _code_names(constant)
