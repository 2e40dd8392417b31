"""NumPy, and array-api-strict on top of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from .base import Array, Framework

__all__ = ["NumpyFramework", "StrictFramework"]


class NumpyFramework(Framework):
    """NumPy."""

    poisons: ClassVar[bool] = True

    def asarray(self, x: Array, device: str = "cpu") -> Any:
        """Return the array itself, with its strides and flags."""
        return x

    def asnumpy(self, x: Any) -> Array:
        """Return the array itself."""
        return np.asarray(x)

    def has_dtype(self, name: str) -> bool:
        """Return whether NumPy has a dtype; bfloat16 is that of ml_dtypes."""
        if name != "bfloat16":
            return super().has_dtype(name)
        try:
            import ml_dtypes
        except ModuleNotFoundError:
            return False
        return hasattr(ml_dtypes, name)

    def policy(self) -> str:
        """Describe how NumPy computes."""
        return "IEEE arithmetic in the arrays' dtype, matrix products by the BLAS"

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Fill the arrays of `numpy.empty` and `numpy.empty_like`, in all threads."""

        def filled(allocate: Any) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                return poison(allocate(*arguments, **keywords))

            return call

        with (
            mock.patch.object(np, "empty", filled(np.empty)),
            mock.patch.object(np, "empty_like", filled(np.empty_like)),
        ):
            yield


class StrictFramework(NumpyFramework):
    """array-api-strict: NumPy restricted to the array-API standard."""

    def asarray(self, x: Array, device: str = "cpu") -> Any:
        """Copy an array; its strides are not kept, as the standard has none."""
        name = str(x.dtype)
        if not self.has_dtype(name):
            raise TypeError(f"{self.library} has no {name}")
        return self.xp.asarray(x, copy=True)

    def has_dtype(self, name: str) -> bool:
        """Return whether the standard has a dtype."""
        return hasattr(self.xp, name)

    def policy(self) -> str:
        """Describe how array-api-strict computes."""
        return "by NumPy: IEEE arithmetic in the arrays' dtype, matrix products by the BLAS"


def poison(x: Array) -> Array:
    """Fill an array with NaN, of integers with the largest value, of booleans with True."""
    kind = x.dtype.kind
    if kind in "fc" or x.dtype.name == "bfloat16":
        x.fill(np.nan)
    elif kind in "iu":
        x.fill(np.iinfo(x.dtype).max)
    elif kind == "b":
        x.fill(True)
    return x
