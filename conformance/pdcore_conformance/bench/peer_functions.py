"""The functions that the peers of `pdcore_conformance.bench.peers` run.

Each takes a workload and returns a function of {"q", "k", "v"}. The libraries are imported when the
function is built, never before.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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


def sdpa(kernel: str | None) -> Callable[[Workload], Attention]:
    """Build PyTorch's `scaled_dot_product_attention`, with a named kernel or PyTorch's choice."""

    def make(workload: Workload) -> Attention:
        torch = importlib.import_module("torch")
        causal = "causal" in workload.spec

        def attend(x: Mapping[str, Any]) -> Any:
            with _kernel(kernel):
                return torch.nn.functional.scaled_dot_product_attention(
                    x["q"], x["k"], x["v"], is_causal=causal
                )

        return attend

    return make


@contextmanager
def _kernel(name: str | None) -> Iterator[None]:
    """Restrict PyTorch to a kernel in a block; None leaves the choice to PyTorch."""
    if name is None:
        yield
        return
    attention = importlib.import_module("torch.nn.attention")
    with attention.sdpa_kernel(getattr(attention.SDPBackend, name)):
        yield


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
    torch = importlib.import_module("torch")
    performer = importlib.import_module("performer_pytorch.performer_pytorch")

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = (torch.nn.functional.elu(x[name]) + 1 for name in "qk")
        if "causal" in workload.spec:
            return performer.causal_linear_attention_noncuda(q, k, x["v"], eps=0.0)
        return performer.linear_attention(q, k, x["v"])

    return attend


def jax_nn(implementation: str) -> Callable[[Workload], Attention]:
    """Build `jax.nn.dot_product_attention` with a named implementation."""

    def make(workload: Workload) -> Attention:
        jax = importlib.import_module("jax")
        causal = "causal" in workload.spec

        def attend(x: Mapping[str, Any]) -> Any:
            # JAX takes (B, N, H, D).
            q, k, v = (x[name].swapaxes(-2, -3) for name in "qkv")
            out = jax.nn.dot_product_attention(
                q, k, v, is_causal=causal, implementation=implementation
            )
            return out.swapaxes(-2, -3)

        return attend

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
    """Build a session of onnxruntime for ONNX's Attention operator (opset 23)."""
    onnx, runtime = map(importlib.import_module, ("onnx", "onnxruntime"))
    element = onnx.helper.np_dtype_to_tensor_dtype(_numpy_dtype(workload.dtype))
    names = ("q", "k", "v", "out")
    q, k, v, out = (onnx.helper.make_tensor_value_info(n, element, workload.shape) for n in names)
    node = onnx.helper.make_node(
        "Attention",
        names[:3],
        names[3:],
        scale=1 / math.sqrt(workload.shape[-1]),
        is_causal=int("causal" in workload.spec),
    )
    graph = onnx.helper.make_graph([node], "attention", [q, k, v], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    model.ir_version = 11
    options = runtime.SessionOptions()
    options.intra_op_num_threads = _threads()
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {name: x[name] for name in names[:3]})[0]


def _numpy_dtype(name: str) -> Any:
    from ..judge.calls import dtype_of

    return dtype_of(name)


def _threads() -> int:
    return int(os.environ.get("PDCORE_NUM_THREADS", "0"))
