"""The abilities of a device on which the choice of a kernel depends."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch

__all__ = ["kind", "unfolded", "without_flex", "without_triton"]

#: The most features of a row that a tile of the Triton kernels holds in registers.
MOST = 256


def kind(device: str) -> str:
    """Return the kind of a device, ``"cpu"`` or ``"cuda"``."""
    return device.partition(":")[0]


@lru_cache(maxsize=64)
def without_triton(device: str) -> str:
    """Return why no Triton kernel runs on a device; empty if one does. Does not import Triton."""
    if kind(device) != "cuda":
        return f"{device} is no CUDA device"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return ""


@lru_cache(maxsize=64)
def without_flex(device: str) -> str:
    """Return why FlexAttention does not run on a device; empty if it does."""
    if kind(device) != "cuda":
        return f"PyTorch has no gradients of it on {kind(device)}"
    why = without_triton(device)
    if why:
        return why
    name = "torch.nn.attention.flex_attention"
    if find_spec(name) is None or not hasattr(import_module(name), "AuxRequest"):
        return f"PyTorch {torch.__version__} gives no log-sum-exp by return_aux"
    return ""


def unfolded(device: str, dtype: str, dim: int) -> str:
    """Return why no Triton kernel folds statistics of keys; empty if one does."""
    if why := without_triton(device):
        return why
    if dtype == "float64":
        return "it computes in float32"
    return f"more than {MOST} features" if dim > MOST else ""
