"""The functions that the peers of `pdcore_conformance.bench.peers` run.

Each takes a workload and returns a function of {"q", "k", "v"}. The libraries are imported when the
function is built, never before.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from pdcore.spec import parse

from .numpy_variants import VARIANTS
from .workload import Workload

__all__ = [
    "Attention",
    "cupy_textbook",
    "jax_nn",
    "literal_jax",
    "literal_numpy",
    "literal_sdpa",
    "literal_torch",
    "numpy_variant",
    "onnx_attention",
    "performer",
    "sdpa",
]

#: From arrays by name to the result.
Attention = Callable[[Mapping[str, Any]], Any]


def numpy_variant(name: str) -> Callable[[Workload], Attention]:
    """Build softmax attention in NumPy, see `pdcore_conformance.bench.numpy_variants`."""
    return lambda workload: lambda x: VARIANTS[name](x["q"], x["k"], x["v"])


def _normalized(x: Mapping[str, Any], xp: Any) -> tuple[Any, Any]:
    """Normalize queries and keys by the moments of the keys, by the formula of the paper."""
    mean = xp.mean(x["k"], axis=-2, keepdims=True)
    deviation = xp.sqrt(xp.mean((x["k"] - mean) ** 2, axis=-2, keepdims=True) + 1e-5)
    return (x["q"] - mean) / deviation, (x["k"] - mean) / deviation


def literal_numpy(workload: Workload) -> Attention:
    """Build Attention-BN in NumPy, from normalized queries and keys."""
    import numpy as np

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = _normalized(x, np)
        return VARIANTS["in place"](q, k, x["v"])

    return attend


def _asked(workload: Workload, x: Mapping[str, Any]) -> Any:
    """Return a workload's arrays as the functions of the peer backends take them."""
    from ..peer_backends.base import Asked

    spec = parse(workload.spec)
    scale = 1 / math.sqrt(workload.shape[-1])
    return Asked(x["q"], x["k"], x["v"], spec, scale, causal=spec.support.causal)


def sdpa(kernel: str | None) -> Callable[[Workload], Attention]:
    """Build PyTorch's `scaled_dot_product_attention`, with a named kernel or PyTorch's choice."""

    def make(workload: Workload) -> Attention:
        from ..peer_backends import on_torch

        return lambda x: on_torch.sdpa(kernel, _asked(workload, x))

    return make


def literal_sdpa(workload: Workload) -> Attention:
    """Build Attention-BN by PyTorch's fused attention, from normalized queries and keys."""
    torch = importlib.import_module("torch")
    compat = importlib.import_module("array_api_compat.torch")

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = _normalized(x, compat)
        return torch.nn.functional.scaled_dot_product_attention(q, k, x["v"])

    return attend


def literal_torch(workload: Workload) -> Attention:
    """Build Attention-BN in PyTorch by the formula of the paper, with the (N, M) weights."""
    torch = importlib.import_module("torch")
    compat = importlib.import_module("array_api_compat.torch")

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = _normalized(x, compat)
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ x["v"]

    return attend


def cupy_textbook(workload: Workload) -> Attention:
    """Build attention with the (N, M) matrix of weights, as CuPy has no fused attention."""
    cupy = importlib.import_module("cupy")
    causal = "causal" in workload.spec

    def attend(x: Mapping[str, Any]) -> Any:
        q, k, v = (x[name] for name in "qkv")
        s = (q @ k.swapaxes(-1, -2)).astype(cupy.promote_types(q.dtype, cupy.float32))
        s /= math.sqrt(q.shape[-1])
        if causal:
            hidden = cupy.triu(cupy.ones(s.shape[-2:], dtype=bool), 1)
            s = cupy.where(hidden, -cupy.inf, s)
        s -= s.max(axis=-1, keepdims=True)
        cupy.exp(s, out=s)
        s /= s.sum(axis=-1, keepdims=True)
        return s.astype(v.dtype) @ v

    return attend


def performer(workload: Workload) -> Attention:
    """Build the linear attention of performer-pytorch, with the features elu + 1."""
    from ..peer_backends import on_performer

    return lambda x: on_performer.linear_attention(_asked(workload, x))


def jax_nn(implementation: str) -> Callable[[Workload], Attention]:
    """Build `jax.nn.dot_product_attention` with a named implementation."""

    def make(workload: Workload) -> Attention:
        from ..peer_backends import on_jax

        return lambda x: on_jax.jax_nn(implementation, _asked(workload, x))

    return make


def literal_jax(workload: Workload) -> Attention:
    """Build Attention-BN by `jax.nn.dot_product_attention`, from normalized arrays."""
    jax = importlib.import_module("jax")
    attention = jax_nn("xla")(workload)

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = _normalized(x, jax.numpy)
        return attention({"q": q, "k": k, "v": x["v"]})

    return attend


def onnx_attention(workload: Workload) -> Attention:
    """Build ONNX's Attention operator in onnxruntime."""
    from ..peer_backends import on_onnxruntime

    return lambda x: on_onnxruntime.onnx_attention(_asked(workload, x))
