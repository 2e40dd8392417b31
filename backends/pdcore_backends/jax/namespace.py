"""jax.numpy as an array-API namespace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

__all__ = ["NAMESPACE", "in_full"]


class _Namespace:
    """jax.numpy, with int32 as `int64` unless JAX has 64-bit types enabled."""

    # Read by `pdcore.extend.stop_gradient`.
    stop_gradient = staticmethod(jax.lax.stop_gradient)

    @staticmethod
    def divide(x: Any, y: Any) -> Any:
        """Divide; the derivative has no 1 / y^2, which overflows where 1 / y does not.

        Nor has it an infinite y, by which quotients and derivatives are 0.
        """
        none = jax.numpy.isinf(y)
        y = jax.numpy.where(none, 1, y)
        unit = jax.lax.stop_gradient(y)
        return (x / unit) / (y / unit) * jax.numpy.where(none, 0, 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.numpy, name)

    @property
    def int64(self) -> Any:
        # Without 64 bits, asking for int64 gives int32 and a warning at every use.
        return jax.numpy.int64 if jax.config.jax_enable_x64 else jax.numpy.int32


NAMESPACE = _Namespace()


@contextmanager
def in_full() -> Iterator[None]:
    """Compute in full precision, which is not the default for float32 on GPU and TPU.

    JAX records the precision with each product, so gradients have full precision too. The caller's
    checks of implicit broadcasts and casts are about the caller's code: plans are array-API calls,
    which broadcast.
    """
    with (
        jax.default_matmul_precision("highest"),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield
