"""The checks of a GPU, by the emulator."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pdcore.plugins import registry as plugins
from pdcore_conformance.gpu import checks as gpu_checks


def test_the_wrappers_by_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda_on_cpu as cuda

    from pdcore_conformance.gpu.ptx_wrappers import checks, source

    names = dict.fromkeys(check.kernel for check in checks())
    module = cuda.RawModule(source(), options=("-std=c++17",), name_expressions=tuple(names))
    monkeypatch.setattr(
        gpu_checks,
        "compiled",
        lambda: {
            "module": module,
            "capability": 90,
            "array": np.asarray,
            "empty": cuda.empty,
            "host": np.asarray,
        },
    )
    outcomes = [case["outcome"] for case in gpu_checks.wrapper_cases()]
    assert outcomes == ["passed"] * (1 + len(list(checks())))


def kind_of(kernel: str) -> str:
    """Give an instantiation's name without the widths and the types of its arrays."""
    return re.sub(r"\b(ptx::\w+|scalar|float|double|\d\d+)\b", "", kernel)


def test_the_small_calls_go_through_every_kernel() -> None:
    import cuda_gate
    import cuda_gate_tensor_cores
    import emulated_cupy as emulated

    emulated.register()
    try:
        runtime = plugins.load_backend(emulated.NAME).runtime
        assert gpu_checks.small_calls(f"{emulated.NAME}:cpu") == len(gpu_checks.CALLS)
    finally:
        plugins.unregister_backend(emulated.NAME)
    launched = set(map(kind_of, runtime.launches))
    known = {kind_of(name) for name, _ in cuda_gate.kernels()}
    known |= set(map(kind_of, cuda_gate_tensor_cores.kernels()))
    assert launched == known
