"""The PyTorch backend: its declaration. The code is in `.impl`, loaded at first use."""

from __future__ import annotations

from collections.abc import Sequence

from pluggy import HookimplMarker

from pdcore.extend import FEATURES, BackendInfo

_NOT_YET = {"deterministic", "batch_invariant"}

INFO = BackendInfo(
    name="torch",
    load="pdcore_backends.torch.impl:TorchBackend",
    library="torch",
    requires=("torch",),
    install="pip install 'pdcore[torch]'",
    devices=("cpu", "cuda"),
    capabilities={
        **{f: "not_implemented" if f in _NOT_YET else "full" for f in FEATURES},
        "axis_name": "unsupported",
    },
)


@HookimplMarker("pdcore")
def pdcore_backends() -> Sequence[BackendInfo]:
    """Declare the backend."""
    return [INFO]
