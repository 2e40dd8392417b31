"""`keras.ops.dot_product_attention`, on Keras' JAX backend."""

from __future__ import annotations

import os
from typing import Any

from jax import numpy as jnp

from . import PEERS
from .base import Asked, by_row
from .on_jax import JaxPeer

os.environ.setdefault("KERAS_BACKEND", "jax")  # read at the import of Keras

import keras

__all__ = ["KerasOps"]

if keras.backend.backend() != "jax":
    raise RuntimeError(
        f"Keras runs on {keras.backend.backend()} in this process; set KERAS_BACKEND=jax before "
        "Keras is imported"
    )


class KerasOps(JaxPeer):
    """`keras.ops.dot_product_attention`, on JAX arrays."""

    info = PEERS["keras_ops"]
    packages = ("keras",)

    def attend(self, asked: Asked) -> tuple[Any, Any]:
        """Call the function."""
        out = keras.ops.dot_product_attention(
            *(by_row(x, jnp) for x in asked[:3]),
            bias=asked.bias,
            mask=asked.mask,
            scale=asked.scale,
            is_causal=asked.causal,
        )
        return by_row(out, jnp), None
