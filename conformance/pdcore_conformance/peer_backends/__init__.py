"""Attentions that are not this project's, as backends: the declarations.

Each peer is a thin backend around one public function of a library, and nothing in it mends what
that function computes: ``pdcore conform peer:NAME`` judges the function, and ``backend="NAME"``
runs it. Their priority is negative, so a call runs on a peer only where the caller names it.

The bench (`pdcore_conformance.bench.peers`) times the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pluggy import HookimplMarker

from pdcore.extend import BackendInfo

__all__ = ["PEERS", "pdcore_backends"]

_TORCH = "pip install 'pdcore[torch]'"
_JAX = "pip install 'pdcore[jax]'"

#: What a function computes that takes a scale, a boolean mask and arrays of float32.
_MASKED = ("exponential", "float32", "causal", "window", "mask", "key_mask", "offset")
_16_BIT = ("float16", "bfloat16")


def _peer(
    name: str,
    load: str,
    library: str,
    features: Sequence[str],
    *requires: str,
    install: str,
    devices: Sequence[str] = ("cpu",),
) -> BackendInfo:
    return BackendInfo(
        name=name,
        load=f"{__name__}.{load}",
        library=library,
        requires=(library, *requires),
        install=install,
        devices=devices,
        priority=-1,
        capabilities=dict.fromkeys(features, "full"),
    )


def _sdpa(kernel: str, *devices: str) -> BackendInfo:
    name = f"torch_sdpa_{kernel.lower()}" if kernel else "torch_sdpa"
    features = (*_MASKED, *_16_BIT, "float64", "bias", "gqa", "autodiff", "deterministic")
    load = f"on_torch:Sdpa{kernel.capitalize()}"
    return _peer(name, load, "torch", features, install=_TORCH, devices=devices)


_DECLARED = (
    _sdpa("", "cpu", "cuda"),
    _sdpa("math", "cpu", "cuda"),
    _sdpa("flash", "cpu", "cuda"),
    _sdpa("efficient", "cuda"),
    _sdpa("cudnn", "cuda"),
    _peer(
        "torch_multihead",
        "on_torch:Multihead",
        "torch",
        (*_MASKED, *_16_BIT, "float64", "bias", "autodiff", "deterministic"),
        install=_TORCH,
        devices=("cpu", "cuda"),
    ),
    _peer(
        "torch_flex",
        "on_torch:Flex",
        "torch",
        # On the CPU it has no gradients.
        (*_MASKED, *_16_BIT, "float64", "softcap", "bias", "gqa", "lse", "deterministic"),
        install=_TORCH,
        devices=("cpu", "cuda"),
    ),
    _peer(
        "jax_nn",
        "on_jax:JaxNn",
        "jax",
        (*_MASKED, *_16_BIT, "float64", "bias", "gqa", "lse", "autodiff", "deterministic"),
        install=_JAX,
        devices=("cpu", "cuda"),
    ),
    _peer(
        "keras_ops",
        "on_keras:KerasOps",
        "jax",
        (*_MASKED, *_16_BIT, "float64", "bias", "gqa", "autodiff", "deterministic"),
        "keras",
        install="pip install keras 'pdcore[jax]', and KERAS_BACKEND=jax",
        devices=("cpu", "cuda"),
    ),
    _peer(
        "onnxruntime",
        "on_onnxruntime:OnnxAttention",
        "numpy",
        (*_MASKED, "float16", "float64", "softcap", "bias", "gqa", "deterministic", "thread_safe"),
        "onnx",
        "onnxruntime",
        install="pip install onnx onnxruntime",
    ),
    _peer(
        "performer",
        "on_performer:Performer",
        "torch",
        ("features", "float32", "float64", *_16_BIT, "causal", "autodiff", "deterministic"),
        "performer_pytorch",
        install="pip install --no-deps performer-pytorch einops "
        "'local-attention<1.10' axial-positional-embedding",
    ),
    _peer(
        "fla_naive",
        "on_fla:FlaNaive",
        "torch",
        ("exponential", "features", "float32", "float64", *_16_BIT, "causal", "gqa")
        + ("autodiff", "deterministic"),
        "fla",
        "triton",
        install="pip install --no-deps fla-core einops triton",
    ),
)

#: The declaration of every peer, by name.
PEERS: Mapping[str, BackendInfo] = {info.name: info for info in _DECLARED}


@HookimplMarker("pdcore")
def pdcore_backends() -> Sequence[BackendInfo]:
    """Declare the backends."""
    return list(PEERS.values())
