"""Arguments of the layers of Flax about products, and the module that keeps weights."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen, nnx

from pdcore import UnsupportedError

__all__ = ["check_precision", "refuse_products", "sow"]


def refuse_products(**products: Any) -> None:
    """Raise for functions that would replace the products of queries, keys and values."""
    for name, product in products.items():
        if product is not None:
            raise UnsupportedError(
                f"{name}: got {product!r}, expected None: the scores are made block by block, not "
                "by a product that could be exchanged; use Flax's own attention for it"
            )


def check_precision(precision: Any) -> None:
    """Raise for a `precision` that names an algorithm instead of a `jax.lax.Precision`."""
    if precision is None or isinstance(precision, jax.lax.Precision):
        return
    parts = precision if isinstance(precision, tuple) else (precision,)
    try:
        for part in parts:
            jax.lax.Precision(part)
    except ValueError as error:
        raise UnsupportedError(
            f"precision: got {precision!r}, expected None or a jax.lax.Precision: products have "
            "the full precision of their dtype, by the algorithm that the backend chooses"
        ) from error


def sow(module: Any, weights: Any) -> None:
    """Sow weights into a module of Flax."""
    if isinstance(module, nnx.Module):
        module.sow(nnx.Intermediate, "attention_weights", weights)
    elif isinstance(module, linen.Module):
        module.sow("intermediates", "attention_weights", weights)
    else:
        raise TypeError(
            f"module: got {type(module).__name__}, expected a flax.nnx.Module or a "
            "flax.linen.Module to sow the weights into"
        )
