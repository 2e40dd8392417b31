"""The array-API namespace of PyTorch, such that PyTorch's compiler can trace it.

Everything comes from array-api-compat except a few functions: its `cumulative_sum` and `clip` look
namespaces up in caches or compare with NaN in Python, which cannot be traced, and its `concat`
promotes dtypes that PyTorch promotes anyway. `random_matrix` is an extension that
`pdcore.spec.kernels.RandomFeatures` calls.
"""

from __future__ import annotations

from typing import Any

import torch
from array_api_compat.torch import *  # noqa: F403

from pdcore import extend

bool = torch.bool


def cumulative_sum(
    x: torch.Tensor,
    /,
    *,
    axis: int | None = None,
    dtype: Any = None,
    include_initial: Any = False,
) -> torch.Tensor:
    """Sum along an axis, see the array-API standard."""
    axis = 0 if axis is None else axis
    total = torch.cumsum(x, axis, dtype=dtype)
    if not include_initial:
        return total
    shape = list(x.shape)
    shape[axis] = 1
    return torch.cat([total.new_zeros(shape), total], axis)


def concat(arrays: Any, /, *, axis: int | None = 0) -> torch.Tensor:
    """Join along an axis, see the array-API standard; PyTorch promotes dtypes by itself."""
    if axis is None:
        return torch.cat([x.flatten() for x in arrays])
    return torch.cat(arrays, axis)


def clip(x: torch.Tensor, /, min: Any = None, max: Any = None) -> torch.Tensor:
    """Bound values, see the array-API standard."""
    return torch.clamp(x, min, max)


def accumulation(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of sums over a tensor: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def random_matrix(
    count: int, dim: int, seed: int, factor: float, like: torch.Tensor
) -> torch.Tensor:
    """Draw the matrix of random features, times a factor, in the dtype and device of `like`."""
    matrix: torch.Tensor = torch.ops.pdcore.random_matrix(count, dim, seed)
    return (factor * matrix).to(like)


@torch.library.custom_op(
    "pdcore::random_matrix",
    mutates_args=(),  # type: ignore[untyped-decorator]
    schema="(SymInt count, SymInt dim, SymInt seed) -> Tensor",
)
def _random_matrix(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(extend.random_matrix(count, dim, seed).copy())


@_random_matrix.register_fake  # type: ignore[untyped-decorator]
def _(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.empty(count, dim, dtype=torch.float64)
