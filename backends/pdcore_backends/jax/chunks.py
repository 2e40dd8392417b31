"""Rows cut into chunks of one size on a new first axis, for `lax.scan` and `lax.map`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

__all__ = ["cut", "joined"]


def cut(x: Any, size: int, **options: Any) -> Any:
    """Cut rows (..., R, F) into (C, ..., size, F), padded by `jax.numpy.pad` with `options`."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % size), (0, 0)], **options)
    return jnp.moveaxis(jnp.reshape(x, (*x.shape[:-2], -1, size, x.shape[-1])), -3, 0)


def joined(x: Any, rows: int) -> Any:
    """Return the first `rows` rows of chunks, the inverse of `cut`."""
    x = jnp.moveaxis(x, 0, -3)
    shape = (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])
    return jnp.reshape(x, shape)[..., :rows, :]
