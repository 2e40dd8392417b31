"""The NumPy backend: its declaration. The code is in `.impl`, loaded at first use."""

from __future__ import annotations

from collections.abc import Sequence

from pluggy import HookimplMarker

from pdcore.backend import FEATURES, BackendInfo

_ELSEWHERE = {"autodiff", "double_backward", "vmap", "jvp", "compile", "dropout", "axis_name"}

INFO = BackendInfo(
    name="numpy",
    load="pdcore_backends.numpy.impl:NumpyBackend",
    library="numpy",
    requires=("numpy",),
    install="pip install numpy",
    capabilities={
        feature: "unsupported" if feature in _ELSEWHERE else "full" for feature in FEATURES
    },
)


@HookimplMarker("pdcore")
def pdcore_backends() -> Sequence[BackendInfo]:
    """Declare the backend."""
    return [INFO]
