"""The NumPy backend: its declaration. The code is in `.impl`, loaded at first use."""

from __future__ import annotations

from collections.abc import Sequence

from pluggy import HookimplMarker

from pdcore.extend import FEATURES, BackendInfo

_ELSEWHERE = {"autodiff", "double_backward", "vmap", "jvp", "compile", "axis_name", "group"}

INFO = BackendInfo(
    name="numpy",
    load="pdcore_backends.numpy.impl:NumpyBackend",
    library="numpy",
    requires=("numpy",),
    install="pip install numpy",
    capabilities={
        **{f: "unsupported" if f in _ELSEWHERE else "full" for f in FEATURES},
        # Whether a block of rows needs a maximum subtracted is decided for all its heads.
        "batch_invariant": "not_implemented",
    },
)


@HookimplMarker("pdcore")
def pdcore_backends() -> Sequence[BackendInfo]:
    """Declare the backend."""
    return [INFO]
