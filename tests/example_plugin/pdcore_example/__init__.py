"""The declaration of an example plugin of pdcore, without an import of Numba."""

from __future__ import annotations

from pdcore.extend import FEATURES, BackendInfo, hookimpl

from .kernel import Sigmoid
from .normalization import KeyRMS

__all__ = ["INFO", "KeyRMS", "Sigmoid"]

# NumPy has no automatic differentiation; `attention_vjp` still works, as every plan has a pullback.
_LACKS = {"autodiff", "double_backward", "vmap", "jvp", "compile"}
_NOT_WRITTEN = {"dropout", "axis_name", "group"}

INFO = BackendInfo(
    name="numba",
    load="pdcore_example.backend:NumbaBackend",
    library="numpy",
    requires=("numba", "scipy", "threadpoolctl"),
    install="pip install numba scipy threadpoolctl",
    capabilities={
        feature: "unsupported"
        if feature in _LACKS
        else "not_implemented"
        if feature in _NOT_WRITTEN
        else "full"
        for feature in FEATURES
    },
)


@hookimpl
def pdcore_backends() -> list[BackendInfo]:
    """Declare the backend."""
    return [INFO]


@hookimpl
def pdcore_kernels() -> list[type[Sigmoid]]:
    """Add the word ``sigmoid``."""
    return [Sigmoid]


@hookimpl
def pdcore_normalizations() -> list[type[KeyRMS]]:
    """Add the word ``key_rms``."""
    return [KeyRMS]
