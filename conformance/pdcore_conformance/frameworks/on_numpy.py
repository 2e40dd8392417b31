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

    def is_writeable(self, x: Any) -> bool:
        """Return whether the flags of an array allow to write into it."""
        return bool(np.asarray(x).flags.writeable)

    def shares_memory(self, x: Any, y: Any) -> bool:
        """Return whether the memory of two arrays overlaps."""
        return np.may_share_memory(np.asarray(x), np.asarray(y))

    def overwrite(self, x: Any, values: Array) -> bool:
        """Replace the values of an array in place."""
        x[...] = values
        return True

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

    def is_writeable(self, x: Any) -> bool:
        """Return True: the standard has no flag."""
        return True

    def shares_memory(self, x: Any, y: Any) -> bool:
        """Return whether two objects are one array; the standard has no other views."""
        return x is y

    def overwrite(self, x: Any, values: Array) -> bool:
        """Replace the values of an array in place."""
        x[...] = self.xp.asarray(values, dtype=x.dtype)
        return True

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
