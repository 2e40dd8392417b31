"""The names of the attention layers of Flax models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from flax import linen, nnx

from ..flax import SpecAttention
from ..flax.attention import Attention

__all__ = ["linen_layers", "nnx_layers"]

_Layers = tuple[Callable[[Any], str | None], Callable[[], dict[str, str]]]


def nnx_layers(model: Any) -> _Layers:
    """Name the layers of an nnx model by their paths.

    Layers that share one `attention_fn` cannot be told apart, and have one name, such as ``a | b``.
    """
    paths: dict[int, list[str]] = {}
    left: dict[str, str] = {}
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path)) or type(module).__name__
        attend = getattr(module, "attention_fn", None)
        if isinstance(module, SpecAttention):
            for of_mode in (module._in_evaluation, module._in_training):
                paths.setdefault(id(of_mode), []).append(name)
        elif isinstance(attend, Attention):
            paths.setdefault(id(attend), []).append(name)
        elif attend is not None and not isinstance(attend, SpecAttention):
            left[name] = f"its attention_fn is {getattr(attend, '__name__', attend)}, not pdcore's"
    names = {key: " | ".join(dict.fromkeys(found)) for key, found in paths.items()}
    left |= dict.fromkeys(names.values(), "it was not called, or ran compiled by nnx.jit")
    return (lambda attend: names.get(id(attend))), lambda: left


def linen_layers(stack: ExitStack) -> _Layers:
    """Name the layers of Linen by the paths of the modules that run."""
    running: list[str] = []
    seen: dict[str, str] = {}
    recorded: set[str] = set()

    def follow(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        name = "/".join(module.path) or type(module).__name__
        if "Attention" in type(module).__name__:
            seen[name] = f"{type(module).__name__}: its attention is not pdcore's"
        running.append(name)
        try:
            return call(*args, **kwargs)
        finally:
            running.pop()

    stack.enter_context(linen.intercept_methods(follow))

    def left() -> dict[str, str]:
        if not seen:
            return {"model": "no attention ran; jax.jit runs no Python that could record"}
        return {a: why for a, why in seen.items() if a not in recorded}

    def name_of(_: Any) -> str | None:
        recorded.update(running)
        return running[-1] if running else None

    return name_of, left
