"""What a backend's speed is compared with: a registry of other ways to compute the same attention.

A peer states its library, its devices and what it computes, and builds a function of q, k and v. A
peer that cannot run is listed with the reason. The bench compares the results of every peer with
the oracle before it times the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from pdcore import bind
from pdcore.backend import BackendInfo
from pdcore.errors import nearest
from pdcore.plugins import registered

from ..frameworks import framework
from ..peer_backends import PEERS as BACKENDS
from .peer_functions import (
    Attention,
    cupy_textbook,
    jax_nn,
    literal_jax,
    literal_numpy,
    literal_sdpa,
    literal_torch,
    numpy_variant,
    onnx_attention,
    performer,
    sdpa,
)
from .workload import Workload, half_pooled

__all__ = ["PEERS", "Peer", "choose_peers"]


@dataclass(frozen=True)
class Peer:
    """Another way to compute some attentions.

    Parameters
    ----------
    name : str
        The name that is printed, and that ``--against`` takes.
    library : str
        The library whose arrays the peer takes.
    computes : tuple of str or None
        The specs that the peer computes; None for all of them.
    make : callable
        ``make(workload) -> function of {"q", "k", "v"}``.
    devices : tuple of str
        The kinds of device on which the peer runs.
    requires : tuple of str
        The modules that the peer needs beside the library.
    install : str
        The command that installs the library and the modules.
    backward : bool
        Whether the peer is differentiable.
    instead : str
        The spec that the peer computes in place of the workload's, so that the bench shows what
        the workload's spec costs beyond that one.
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
        """Return why the peer cannot run on a device of this machine, None where it can."""
        if device.partition(":")[0] not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        absent = [name for name in (self.library, *self.requires) if find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)} ({self.install})"
        return framework(self.library).available(device)

    def takes(self, workload: Workload) -> bool:
        """Return whether the peer computes a workload."""
        if self.instead and workload.spec == self.instead:
            return False
        known = self.computes is None or workload.spec in self.computes
        return known and (self.backward or workload.direction == "forward")

    def computed(self, workload: Workload) -> Workload:
        """Return the workload with the spec that the peer computes for it, see `instead`."""
        return workload._replace(spec=self.instead) if self.instead else workload


def choose_peers(names: Sequence[str] | None) -> list[Peer]:
    """Return the peers with some names, or all peers.

    Parameters
    ----------
    names : sequence of str or None
        Names of `PEERS`, or ``"backend NAME"`` for another backend of pdcore.

    Raises
    ------
    ValueError
        For an unknown name, with the nearest one.
    """
    if names is None:
        return list(PEERS.values())
    others = {f"backend {name}": info for name, info in registered().items()}
    for name in names:
        if name not in PEERS and name not in others:
            raise ValueError(f"unknown peer {name!r}; {nearest(name, [*PEERS, *others])}")
    return [PEERS[name] if name in PEERS else _backend(name, others[name]) for name in names]


def _backend(name: str, info: BackendInfo) -> Peer:
    """Return a peer that runs another backend of pdcore."""

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


#: The specs that PyTorch's `scaled_dot_product_attention` computes.
_SDPA = ("softmax", "causal")
#: PyTorch's fused kernels on CUDA: the name in a peer's name, and PyTorch's name.
_KERNELS = (
    ("flash", "FLASH_ATTENTION"),
    ("efficient", "EFFICIENT_ATTENTION"),
    ("cudnn", "CUDNN_ATTENTION"),
)
_TORCH, _JAX = (BACKENDS[name].install for name in ("torch_sdpa", "jax_nn"))
_PERFORMER, _ONNX = BACKENDS["performer"], BACKENDS["onnxruntime"]
_CUPY = "pip install 'pdcore[cupy]'"
_BOTH = ("cpu", "cuda")

#: Every peer by name.
PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        *(
            Peer(f"{name} NumPy", "numpy", ("softmax",), numpy_variant(name))
            for name in ("textbook", "in place", "head by head")
        ),
        Peer("literal Attention-BN, NumPy", "numpy", ("bn",), literal_numpy),
        Peer("matmul and softmax, CuPy", "cupy", _SDPA, cupy_textbook, ("cuda",), (), _CUPY),
        Peer("torch SDPA", "torch", _SDPA, sdpa(None), _BOTH, (), _TORCH, True),
        *(
            Peer(f"torch SDPA, {label}", "torch", _SDPA, sdpa(kernel), ("cuda",), (), _TORCH, True)
            for label, kernel in (*_KERNELS, ("math", "MATH"))
        ),
        *(
            Peer(
                f"torch SDPA of softmax, {label}",
                "torch",
                ("bn", half_pooled(16), f"bn+{half_pooled(16)}"),
                sdpa(kernel),
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
            ("bn", "bn(with_std=false)", half_pooled(8), half_pooled(16), f"bn+{half_pooled(16)}"),
            sdpa(None),
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
            sdpa(None),
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
            performer,
            ("cpu",),
            tuple(_PERFORMER.requires[1:]),
            _PERFORMER.install,
            True,
        ),
        Peer(
            "literal Attention-BN, torch",
            "torch",
            ("bn",),
            literal_torch,
            _BOTH,
            (),
            _TORCH,
            True,
        ),
        Peer(
            "literal Attention-BN, torch SDPA",
            "torch",
            ("bn",),
            literal_sdpa,
            _BOTH,
            (),
            _TORCH,
            True,
        ),
        Peer("jax.nn.dot_product_attention", "jax", _SDPA, jax_nn("xla"), _BOTH, (), _JAX, True),
        Peer(
            "jax.nn.dot_product_attention, cudnn",
            "jax",
            _SDPA,
            jax_nn("cudnn"),
            ("cuda",),
            (),
            _JAX,
            True,
        ),
        *(
            Peer(
                f"jax.nn.dot_product_attention of softmax{label}",
                "jax",
                ("bn", half_pooled(8), half_pooled(16), f"bn+{half_pooled(16)}"),
                jax_nn(name),
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
            jax_nn("xla"),
            _BOTH,
            (),
            _JAX,
            True,
            "causal",
        ),
        Peer("literal Attention-BN, jax.nn", "jax", ("bn",), literal_jax, _BOTH, (), _JAX, True),
        Peer(
            "onnxruntime Attention",
            "numpy",
            _SDPA,
            onnx_attention,
            ("cpu",),
            tuple(_ONNX.requires[1:]),
            _ONNX.install,
        ),
    )
}
