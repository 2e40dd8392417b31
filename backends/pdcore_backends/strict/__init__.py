"""The array-api-strict backend: its declaration. The code is in `.impl`, loaded at first use."""

from __future__ import annotations

from collections.abc import Sequence

from pluggy import HookimplMarker

from pdcore.extend import FEATURES, BackendInfo

_ELSEWHERE = {
    "float16",
    "bfloat16",  # no dtypes of the standard
    "autodiff",
    "double_backward",
    "vmap",
    "jvp",
    "compile",
    "axis_name",
    "group",
}

INFO = BackendInfo(
    name="strict",
    load="pdcore_backends.strict.impl:StrictBackend",
    library="array_api_strict",
    requires=("array_api_strict",),
    install="pip install array-api-strict",
    capabilities={
        **{f: "unsupported" if f in _ELSEWHERE else "full" for f in FEATURES},
        # The products are NumPy's, whose BLAS may sum a batch of another size in another order.
        "batch_invariant": "not_implemented",
    },
)


@HookimplMarker("pdcore")
def pdcore_backends() -> Sequence[BackendInfo]:
    """Declare the backend."""
    return [INFO]
