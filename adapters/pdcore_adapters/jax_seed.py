"""The seed of dropout from a key of `jax.random`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["seed_of"]


def seed_of(key: Any) -> Any:
    """Return 64 bits of a key, uint32 (2,), as `pdcore.attention` takes a seed."""
    return jax.random.bits(key, (2,), jnp.uint32)
