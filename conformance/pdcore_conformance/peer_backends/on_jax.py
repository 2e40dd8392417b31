"""`jax.nn.dot_product_attention`."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import numpy as jnp

from pdcore.extend import Request
from pdcore_backends.jax.namespace import NAMESPACE

from . import PEERS
from .base import Asked, PeerBackend, by_row

__all__ = ["JaxNn", "JaxPeer", "jax_nn"]


def jax_nn(implementation: str, asked: Asked) -> Any:
    """Call `jax.nn.dot_product_attention`: out, or out and lse where lse is asked for."""
    rows, keys = asked.q.shape[-2], asked.k.shape[-2]
    window = None
    if asked.window is not None:
        longest = max(rows, keys)
        window = tuple(longest if n == math.inf else int(n) for n in asked.window)
    result = jax.nn.dot_product_attention(
        *(by_row(x, jnp) for x in asked[:3]),
        bias=asked.bias,
        mask=asked.mask,
        scale=asked.scale,
        is_causal=asked.causal,
        local_window_size=window,
        implementation=implementation,
        return_residual=asked.lse,
    )
    if not asked.lse:
        return by_row(result, jnp)
    out, level = result
    return by_row(out, jnp), jnp.swapaxes(level, 1, 2)


class JaxPeer(PeerBackend):
    """A peer on JAX arrays."""

    def __init__(self) -> None:
        super().__init__()
        self._xp = NAMESPACE

    def limits(self, request: Request) -> list[str]:
        """Return why the function does not take a call: k and v must have one shape."""
        if request.k == request.v:
            return []
        return [f"k {request.k} and v {request.v}: the function takes equal shapes"]


class JaxNn(JaxPeer):
    """`jax.nn.dot_product_attention`, by its implementation ``"xla"``."""

    info = PEERS["jax_nn"]
    arguments = frozenset({"causal", "window"})

    def attend(self, asked: Asked) -> tuple[Any, Any]:
        """Call the function."""
        result = jax_nn("xla", asked)
        return result if asked.lse else (result, None)
