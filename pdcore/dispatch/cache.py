"""The bound functions of calls that bind nothing, from a cache that later calls share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..arrays import compiling
from ..plugins import registry as plugins
from ..spec import AttentionSpec, vocabulary
from . import selection
from .binding import BoundAttention, Choice

__all__ = ["cached_bind"]

_BOUND: dict[Any, BoundAttention] = {}


class _TracedLayers:
    """The bound functions of traced calls, as attributes ``layer_0``, ``layer_1``..."""


_TRACED = _TracedLayers()
_TRACED_NAMES: dict[BoundAttention, str] = {}


def cached_bind(spec: str | AttentionSpec, backend: Choice, device: str | None) -> BoundAttention:
    """Return the bound function of a call, from a cache that later calls share.

    While PyTorch traces the call, the backend is chosen once, for the trace.
    """
    if compiling():
        layer: BoundAttention = getattr(_TRACED, _traced_name(spec, backend, device))
        return layer
    return _cached_bind(spec, backend, device)


def _traced_name(spec: str | AttentionSpec, backend: Choice, device: str | None) -> str:
    # The compiler can trace neither a context variable nor the registry, see `tracing`.
    layer = _cached_bind(spec, backend, device)
    name = _TRACED_NAMES.setdefault(layer, f"layer_{len(_TRACED_NAMES)}")
    setattr(_TRACED, name, layer)
    return name


_traced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cached_bind(spec: str | AttentionSpec, backend: Choice, device: str | None) -> BoundAttention:
    choice: Any = backend
    if backend is not None and not isinstance(backend, str) and isinstance(backend, Sequence):
        choice = tuple(backend)
    try:
        ambient = selection.ambient() if choice is None else None
        key = (spec, choice, device, ambient, plugins.generation(), vocabulary.changes())
        layer = _BOUND.get(key)
    except TypeError:
        return BoundAttention(spec, choice, device)
    if layer is None:
        # Discovery counts as a change of the registry, which would make this entry stale at once.
        plugins.discover()
        key = (*key[:-2], plugins.generation(), vocabulary.changes())
        layer = BoundAttention(spec, choice, device)
        if len(_BOUND) >= 1024:  # a loop over new specs must not grow the cache without end
            _BOUND.clear()
        _BOUND[key] = layer
    return layer
