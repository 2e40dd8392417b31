"""Arrays and errors for the CUDA paths of the PyTorch backend on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch


def draw(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(result: Any, wanted: Any) -> float:
    result, wanted = result.detach(), torch.as_tensor(wanted).detach().double()
    finite = torch.isfinite(wanted)
    assert torch.equal(torch.isfinite(result), finite)
    gap = torch.where(finite, result.double() - wanted, 0.0).abs().max()
    return float(gap / torch.where(finite, wanted, 0.0).abs().max().clamp_min(1.0))
