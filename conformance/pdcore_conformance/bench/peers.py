"""What a backend's speed is compared with: a registry of other ways to compute the same thing.

A peer states its library, where it runs and what it computes, and gives a function of q, k and v.
One that cannot run is named with its reason. None is trusted: the bench holds each against the
oracle before it times it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

from pdcore import bind
from pdcore.backend import BackendInfo
from pdcore.errors import nearest
from pdcore.plugins import registered

from ..frameworks import framework
from .plain import VARIANTS

__all__ = ["PEERS", "Peer", "Workload", "choose_peers", "half_pooled"]

#: Arrays by name to the result.
Attention = Callable[[Mapping[str, Any]], Any]


def half_pooled(heads: int) -> str:
    """Give Attention-SH with half of the heads at scale 2."""
    return f"sh({','.join('1' * (heads // 2) + '2' * (heads - heads // 2))})"


class Workload(NamedTuple):
    """A call that is timed.

    Attributes
    ----------
    spec : str
    shape : tuple of int
        (B, H, N, D) of q, k and v.
    dtype : str
    direction : {"forward", "forward+backward"}
    """

    spec: str
    shape: tuple[int, int, int, int]
    dtype: str = "float32"
    direction: str = "forward"

    def __str__(self) -> str:
        return f"{self.spec} {self.shape} {self.dtype} {self.direction}"


@dataclass(frozen=True)
class Peer:
    """Another way to compute some attentions.

    Parameters
    ----------
    name : str
        As it is printed, and chosen by ``--against``.
    library : str
        Whose arrays it takes.
    computes : tuple of str or None
        Specs; None for all of them.
    make : callable
        ``make(workload) -> function of {"q", "k", "v"}``.
    devices : tuple of str
        Kinds of device.
    requires : tuple of str
        Modules beside the library.
    install : str
        The command that installs what it needs.
    backward : bool
        Whether it is differentiable.
    instead : str
        The spec that it computes in place of a workload's: a yardstick for what the workload's
        own costs.
    """

    name: str
    library: str
    computes: tuple[str, ...] | None
    make: Callable[[Workload], Attention]
    devices: tuple[str, ...] = ("cpu",)
    requires: tuple[str, ...] = ()
    install: str = ""
    backward: bool = False
    instead: str = ""

    def missing(self, device: str) -> str | None:
        """Say why it cannot run on a device here, None where it can."""
        if device.partition(":")[0] not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        absent = [name for name in (self.library, *self.requires) if find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)} ({self.install})"
        return framework(self.library).available(device)

    def takes(self, workload: Workload) -> bool:
        """Whether it computes a workload."""
        if self.instead and workload.spec == self.instead:
            return False
        known = self.computes is None or workload.spec in self.computes
        return known and (self.backward or workload.direction == "forward")

    def own(self, workload: Workload) -> Workload:
        """Give what it computes for a workload."""
        return workload._replace(spec=self.instead) if self.instead else workload


def choose_peers(names: list[str] | None) -> list[Peer]:
    """Give the peers of some names, or all.

    Parameters
    ----------
    names : list of str or None
        Of `PEERS`, or ``"backend NAME"`` for another backend of pdcore.

    Raises
    ------
    ValueError
        For an unknown name, with the nearest one.
    """
    if not names:
        return list(PEERS.values())
    others = {f"backend {name}": info for name, info in registered().items()}
    for name in names:
        if name not in PEERS and name not in others:
            raise ValueError(f"unknown peer {name!r}; {nearest(name, [*PEERS, *others])}")
    return [PEERS[name] if name in PEERS else _backend(name, others[name]) for name in names]


def _backend(name: str, info: BackendInfo) -> Peer:
    """Make a peer of another backend of pdcore."""

    def make(workload: Workload) -> Attention:
        layer = bind(workload.spec, backend=info.name)
        return lambda x: layer(x["q"], x["k"], x["v"])

    differentiates = info.support("autodiff") == "full"
    return Peer(
        name,
        info.library,
        None,
        make,
        tuple(info.devices),
        tuple(info.requires),
        info.install,
        differentiates,
    )


def _plain(name: str) -> Callable[[Workload], Attention]:
    return lambda workload: lambda x: VARIANTS[name](x["q"], x["k"], x["v"])


def _normalised(x: Mapping[str, Any], xp: Any) -> tuple[Any, Any]:
    """Normalise queries and keys by the keys' moments, as the paper writes it."""
    mean = xp.mean(x["k"], axis=-2, keepdims=True)
    deviation = xp.sqrt(xp.mean((x["k"] - mean) ** 2, axis=-2, keepdims=True) + 1e-5)
    return (x["q"] - mean) / deviation, (x["k"] - mean) / deviation


def _literal_numpy(workload: Workload) -> Attention:
    import numpy as np

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = _normalised(x, np)
        return VARIANTS["in place"](q, k, x["v"])

    return attend


def _sdpa(kernel: str | None) -> Callable[[Workload], Attention]:
    """Make PyTorch's, by its own choice of kernel or by a named one."""

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
    if name is None:
        yield
        return
    attention = importlib.import_module("torch.nn.attention")
    with attention.sdpa_kernel(getattr(attention.SDPBackend, name)):
        yield


def _literal_torch(workload: Workload) -> Attention:
    torch = importlib.import_module("torch")
    compat = importlib.import_module("array_api_compat.torch")

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = _normalised(x, compat)
        return torch.nn.functional.scaled_dot_product_attention(q, k, x["v"])

    return attend


def _textbook_torch(workload: Workload) -> Attention:
    """Make Attention-BN as the paper writes it, with the (N, M) matrix of weights."""
    torch = importlib.import_module("torch")
    compat = importlib.import_module("array_api_compat.torch")

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = _normalised(x, compat)
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ x["v"]

    return attend


def _textbook_cupy(workload: Workload) -> Attention:
    """Make attention with the (N, M) matrix of weights, which is what CuPy has by itself."""
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


def _performer(workload: Workload) -> Attention:
    """Make the linear attention of performer-pytorch, on the features elu + 1."""
    torch = importlib.import_module("torch")
    performer = importlib.import_module("performer_pytorch.performer_pytorch")

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = (torch.nn.functional.elu(x[name]) + 1 for name in "qk")
        if "causal" in workload.spec:
            return performer.causal_linear_attention_noncuda(q, k, x["v"], eps=0.0)
        return performer.linear_attention(q, k, x["v"])

    return attend


def _jax(implementation: str) -> Callable[[Workload], Attention]:
    def make(workload: Workload) -> Attention:
        jax = importlib.import_module("jax")
        causal = "causal" in workload.spec

        def attend(x: Mapping[str, Any]) -> Any:
            # It wants (B, N, H, D).
            q, k, v = (x[name].swapaxes(-2, -3) for name in "qkv")
            out = jax.nn.dot_product_attention(
                q, k, v, is_causal=causal, implementation=implementation
            )
            return out.swapaxes(-2, -3)

        return attend

    return make


def _literal_jax(workload: Workload) -> Attention:
    jax = importlib.import_module("jax")
    plain = _jax("xla")(workload)

    def attend(x: Mapping[str, Any]) -> Any:
        q, k = _normalised(x, jax.numpy)
        return plain({"q": q, "k": k, "v": x["v"]})

    return attend


def _onnx(workload: Workload) -> Attention:
    """Make a model of ONNX's own Attention operator (opset 23), and a session for it."""
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
    import os

    return int(os.environ.get("PDCORE_NUM_THREADS", "0"))


_SDPA = ("softmax", "causal")
#: Of PyTorch's fused kernels on CUDA: how a peer and PyTorch call them.
_KERNELS = (
    ("flash", "FLASH_ATTENTION"),
    ("efficient", "EFFICIENT_ATTENTION"),
    ("cudnn", "CUDNN_ATTENTION"),
)
_TORCH = "pip install 'pdcore[torch]'"
_JAX = "pip install 'pdcore[jax]'"
_CUPY = "pip install 'pdcore[cupy]'"
_BOTH = ("cpu", "cuda")

#: Every peer by name.
PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        *(
            Peer(f"{name} NumPy", "numpy", ("softmax",), _plain(name))
            for name in ("textbook", "in place", "head by head")
        ),
        Peer("literal Attention-BN, NumPy", "numpy", ("bn",), _literal_numpy),
        Peer("matmul and softmax, CuPy", "cupy", _SDPA, _textbook_cupy, ("cuda",), (), _CUPY),
        Peer("torch SDPA", "torch", _SDPA, _sdpa(None), _BOTH, (), _TORCH, True),
        *(
            Peer(f"torch SDPA, {label}", "torch", _SDPA, _sdpa(kernel), ("cuda",), (), _TORCH, True)
            for label, kernel in (*_KERNELS, ("math", "MATH"))
        ),
        *(
            Peer(
                f"torch SDPA of softmax, {label}",
                "torch",
                ("bn", half_pooled(16)),
                _sdpa(kernel),
                ("cuda",),
                (),
                _TORCH,
                True,
                "softmax",
            )
            for label, kernel in _KERNELS
        ),
        Peer(
            "torch SDPA of softmax",
            "torch",
            ("bn", half_pooled(8), half_pooled(16)),
            _sdpa(None),
            _BOTH,
            (),
            _TORCH,
            True,
            "softmax",
        ),
        Peer(
            "torch SDPA of causal softmax",
            "torch",
            ("causal+bn(statistics=prefix)",),
            _sdpa(None),
            _BOTH,
            (),
            _TORCH,
            True,
            "causal",
        ),
        Peer(
            "performer-pytorch",
            "torch",
            ("linear", "causal+linear"),
            _performer,
            ("cpu",),
            ("performer_pytorch",),
            "pip install --no-deps performer-pytorch einops "
            "local-attention axial-positional-embedding",
            True,
        ),
        Peer(
            "literal Attention-BN, torch",
            "torch",
            ("bn",),
            _textbook_torch,
            _BOTH,
            (),
            _TORCH,
            True,
        ),
        Peer(
            "literal Attention-BN, torch SDPA",
            "torch",
            ("bn",),
            _literal_torch,
            _BOTH,
            (),
            _TORCH,
            True,
        ),
        Peer("jax.nn.dot_product_attention", "jax", _SDPA, _jax("xla"), _BOTH, (), _JAX, True),
        Peer(
            "jax.nn.dot_product_attention, cudnn",
            "jax",
            _SDPA,
            _jax("cudnn"),
            ("cuda",),
            (),
            _JAX,
            True,
        ),
        *(
            Peer(
                f"jax.nn.dot_product_attention of softmax{label}",
                "jax",
                ("bn", half_pooled(8), half_pooled(16)),
                _jax(name),
                devices,
                (),
                _JAX,
                True,
                "softmax",
            )
            for label, name, devices in (("", "xla", _BOTH), (", cudnn", "cudnn", ("cuda",)))
        ),
        Peer(
            "jax.nn.dot_product_attention of causal softmax",
            "jax",
            ("causal+bn(statistics=prefix)",),
            _jax("xla"),
            _BOTH,
            (),
            _JAX,
            True,
            "causal",
        ),
        Peer("literal Attention-BN, jax.nn", "jax", ("bn",), _literal_jax, _BOTH, (), _JAX, True),
        Peer(
            "onnxruntime Attention",
            "numpy",
            _SDPA,
            _onnx,
            ("cpu",),
            ("onnx", "onnxruntime"),
            "pip install onnx onnxruntime",
        ),
    )
}
