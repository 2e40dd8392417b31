"""The CuPy backend: its declaration. The code is in `.impl`, loaded at first use."""

from __future__ import annotations

from collections.abc import Sequence

from pluggy import HookimplMarker

from pdcore.extend import FEATURES, BackendInfo

_ELSEWHERE = {"autodiff", "double_backward", "vmap", "jvp", "compile", "axis_name", "group"}
_NOT_YET = {"deterministic", "batch_invariant", "thread_safe"}

INFO = BackendInfo(
    name="cupy",
    load="pdcore_backends.cupy.impl:CupyBackend",
    library="cupy",
    requires=("cupy",),
    install="pip install 'pdcore[cupy]'",
    devices=("cuda",),
    capabilities={
        f: "unsupported" if f in _ELSEWHERE else "not_implemented" if f in _NOT_YET else "full"
        for f in FEATURES
    },
)


@HookimplMarker("pdcore")
def pdcore_backends() -> Sequence[BackendInfo]:
    """Declare the backend."""
    return [INFO]
