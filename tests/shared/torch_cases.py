"""Arrays, specs and errors for the tests of the PyTorch backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SPECS = [
    "softmax",
    "causal",
    "bn",
    "bn(statistics=batch)",
    "bn+sh(1,2)",
    "gaussian(gamma=0.3)",
    "cosine",
    "causal+bn(statistics=prefix)",
    "sparse(2,1)",
    "softmax(softcap=2.0)",
    "causal+linear",
    "softmax+h(count)",
]


def draw(*shape: int, count: int = 3, dtype: Any = None, grad: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=dtype or torch.float32).requires_grad_(grad)
        for _ in range(count)
    ]


def relative(result: Any, wanted: Any) -> float:
    wanted = torch.as_tensor(np.asarray(wanted, dtype=np.float64))
    return float((result.detach().double() - wanted).abs().max() / wanted.abs().max())
