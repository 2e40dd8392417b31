"""ONNX's operator Attention (opset 23) in onnxruntime, on NumPy arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime

from pdcore.extend import Request, default_scale
from pdcore_backends.numpy import threads

from . import PEERS
from .base import Asked, PeerBackend

__all__ = ["OnnxAttention", "onnx_attention"]

#: Opset 23 is the first with the operator, and this the model format that came with it.
_OPSET, _FORMAT = 23, 11
_SYMBOLIC = ("batch", "heads", "rows", "columns")


class _Graph(NamedTuple):
    """What a session is built for; the sizes of the arrays are free."""

    dtype: str
    mask: str
    causal: bool
    scale: float | None
    softcap: float
    threads: int


def onnx_attention(asked: Asked) -> Any:
    """Run the operator; neither the inputs nor the result are copied where they are contiguous."""
    mask = asked.bias_or_mask(np)
    if mask is not None:
        # onnxruntime broadcasts the first two axes only, though the operator has all four.
        shape = (*mask.shape[:2], asked.q.shape[-2], asked.k.shape[-2])
        mask = np.broadcast_to(mask, shape)
    graph = _Graph(
        str(asked.q.dtype),
        "" if mask is None else str(mask.dtype),
        asked.causal,
        # The attribute is a float32, and the operator's own 1/sqrt(D) need not be.
        None if asked.scale == default_scale(None, asked.q.shape[-1]) else asked.scale,
        asked.softcap or 0.0,
        threads.count(),
    )
    session = _session(graph)
    out = np.empty((*asked.q.shape[:-1], asked.v.shape[-1]), asked.q.dtype)
    binding = session.io_binding()
    inputs = {"q": asked.q, "k": asked.k, "v": asked.v} | ({} if mask is None else {"mask": mask})
    # Kept until the run has ended, as the binding holds their addresses only.
    arrays = {name: np.ascontiguousarray(x) for name, x in inputs.items()}
    for name, x in arrays.items():
        binding.bind_input(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
    binding.bind_output("out", "cpu", 0, out.dtype, out.shape, out.ctypes.data)
    session.run_with_iobinding(binding)
    return out


@lru_cache(maxsize=64)
def _session(g: _Graph) -> Any:
    """Build the session of a graph that has one node."""
    helper = onnx.helper

    def value(name: str, dtype: str) -> Any:
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, element, [f"{name}_{s}" for s in _SYMBOLIC])

    inputs = [value(name, g.dtype) for name in "qkv"]
    if g.mask:
        inputs.append(value("mask", g.mask))
    node = helper.make_node(
        "Attention",
        [x.name for x in inputs],
        ["out"],
        **({} if g.scale is None else {"scale": g.scale}),
        softcap=g.softcap,
        is_causal=int(g.causal),
    )
    graph = helper.make_graph([node], "attention", inputs, [value("out", g.dtype)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
    model.ir_version = _FORMAT
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = g.threads
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class OnnxAttention(PeerBackend):
    """ONNX's operator Attention, by onnxruntime's CPU provider."""

    info = PEERS["onnxruntime"]
    packages = ("onnx", "onnxruntime")

    def limits(self, request: Request) -> list[str]:
        """Return why the operator does not take a call."""
        reasons = [
            f"{name} {shape}: onnxruntime takes no empty array"
            for name, shape in (("q", request.q), ("k", request.k), ("v", request.v))
            if 0 in shape
        ]
        kernel = request.spec.kernel
        numbers = {name: getattr(kernel, name, None) for name in ("scale", "softcap")}
        if request.dtype == "float64":
            reasons += [
                f"{name} {x} of a float64 call: ONNX rounds it to {np.float32(x)}"
                for name, x in numbers.items()
                if x is not None and float(np.float32(x)) != x
            ]
        return reasons

    def attend(self, asked: Asked) -> tuple[Any, Any]:
        """Run the operator."""
        return onnx_attention(asked), None
