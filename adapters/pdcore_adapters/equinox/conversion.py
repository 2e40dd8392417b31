"""`convert`, which changes the attention layers of a model of Equinox."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import equinox
import jax
from equinox.nn import MultiheadAttention

from pdcore import AttentionSpec, UnsupportedError

from ..bound import MOMENTUM, BoundSpec, Choice, Drop
from .layer import PDMultiheadAttention
from .state import attach_spec

__all__ = ["convert"]


def convert(
    model: Any,
    spec: str | AttentionSpec,
    *,
    backend: Choice = None,
    select: Callable[[str, MultiheadAttention], bool] | None = None,
    dropout_p: float | None = None,
    drop: Drop | None = None,
    momentum: float | None = MOMENTUM,
    axis_name: str | None = None,
) -> Any:
    """Return a model with `PDMultiheadAttention` for each `equinox.nn.MultiheadAttention`.

    The new model has the arrays of `model`, which is not changed.

    Parameters
    ----------
    model : pytree
        A model, or one layer. Layers that are `PDMultiheadAttention` already get the new spec.
    spec, backend, momentum, axis_name
        As in `PDMultiheadAttention`. ``equinox.nn.State(model)`` makes the state of a model
        with running statistics.
    select : callable, optional
        ``select(name, layer)`` says which layers to convert, by names such as ``.blocks[0].attn``;
        by default all.
    dropout_p : float, optional
        The dropout of the converted layers; by default that of each layer.
    drop : {"weights", "output"}, optional
        What it drops; by default what each layer drops. A feature map, such as ``linear``, has no
        weights to drop.

    Returns
    -------
    pytree

    Raises
    ------
    SpecError, UnsupportedError, ValueError
        For a wrong spec, or one that does not fit the heads of a layer; for a model without a
        layer to convert; and for a selected layer of another subclass.

    Examples
    --------
    >>> plain = equinox.nn.MultiheadAttention(4, 16, key=jax.random.key(0))
    >>> str(convert(plain, "bn").spec)
    'softmax+bn'
    """
    bound = BoundSpec(spec, backend)
    converted = 0

    def convert_node(path: Any, layer: Any) -> Any:
        nonlocal converted
        name = jax.tree_util.keystr(path)
        if not _is_layer(layer) or not (select is None or select(name, layer)):
            return layer
        name = name or "the model itself"
        if type(layer) not in (MultiheadAttention, PDMultiheadAttention):
            raise UnsupportedError(
                f"{name}: it is a {type(layer).__module__}.{type(layer).__qualname__}, whose "
                "meaning is its own; leave it out by select="
            )
        converted += 1
        new = object.__new__(PDMultiheadAttention)
        for f in fields(MultiheadAttention):
            object.__setattr__(new, f.name, getattr(layer, f.name))
        if dropout_p is not None:
            dropout = equinox.nn.Dropout(dropout_p, layer.dropout.inference)
            object.__setattr__(new, "dropout", dropout)
        before: Any = getattr(layer, "drop", "weights")
        what = before if drop is None else drop
        attach_spec(new, bound, what, momentum, axis_name, name, "convert")
        return new

    result = jax.tree_util.tree_map_with_path(convert_node, model, is_leaf=_is_layer)
    if not converted:
        raise ValueError(
            "model: nothing to convert: no equinox.nn.MultiheadAttention in it"
            f"{'' if select is None else ' was selected'}"
        )
    return result


def _is_layer(node: Any) -> bool:
    return isinstance(node, MultiheadAttention)
