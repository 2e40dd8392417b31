"""jax.numpy as an array-API namespace."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["NAMESPACE"]


class _Namespace:
    """jax.numpy, with int32 as `int64` unless JAX has 64-bit types enabled."""

    # Read by `pdcore.extend.stop_gradient`.
    stop_gradient = staticmethod(jax.lax.stop_gradient)

    @staticmethod
    def divide(x: Any, y: Any) -> Any:
        """Divide; the derivative has no 1 / y^2, which overflows where 1 / y does not."""
        unit = jax.lax.stop_gradient(jax.numpy.where(jax.numpy.isinf(y), 1, y))
        return (x / unit) / (y / unit)

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.numpy, name)

    @property
    def int64(self) -> Any:
        # Without 64 bits, asking for int64 gives int32 and a warning at every use.
        return jax.numpy.int64 if jax.config.jax_enable_x64 else jax.numpy.int32


NAMESPACE = _Namespace()
