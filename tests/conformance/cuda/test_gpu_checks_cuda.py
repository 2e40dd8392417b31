"""The first steps on a GPU, by the emulator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pdcore.plugins import registry as plugins
from pdcore_conformance.gpu import calls, kernels, ptx_wrappers, steps, variants
from pdcore_conformance.gpu.worker import run_step


def test_the_wrappers_by_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda_on_cpu as cuda

    names = dict.fromkeys(check.kernel for check in ptx_wrappers.checks())
    source = ptx_wrappers.source()
    module = cuda.RawModule(source, options=("-std=c++17",), name_expressions=tuple(names))
    device = {
        "module": module,
        "capability": 90,
        "array": np.asarray,
        "empty": cuda.empty,
        "host": np.asarray,
    }
    monkeypatch.setattr(ptx_wrappers, "compiled", lambda: dict(device))
    monkeypatch.setattr(steps.framework("cupy"), "available", lambda device: None)
    step = steps.step_of("wrappers", "cupy:cuda", 60.0)
    for check in ptx_wrappers.checks():
        case, _ = run_step("wrappers", check.name, step)
        assert (case["outcome"], case["message"]) == ("passed", None), check.name
    old = device | {"capability": 75}
    monkeypatch.setattr(ptx_wrappers, "compiled", lambda: dict(old))
    step = steps.step_of("wrappers", "cupy:cuda", 60.0)
    case, _ = run_step("wrappers", "mma.m16n8k16, f16", step)
    assert case["outcome"] == "not claimed"


def test_a_wrong_wrapper_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    check = next(ptx_wrappers.checks())
    monkeypatch.setattr(ptx_wrappers, "compiled", lambda: {"capability": 90})
    monkeypatch.setattr(ptx_wrappers, "difference", lambda check, **device: "1 of 2 entries differ")
    monkeypatch.setattr(steps.framework("cupy"), "available", lambda device: None)
    case, _ = run_step("wrappers", check.name, steps.step_of("wrappers", "cupy:cuda", 60.0))
    assert (case["outcome"], case["message"]) == ("failed", "1 of 2 entries differ")


@pytest.fixture
def emulated() -> Iterator[Any]:
    import emulated_cupy

    emulated_cupy.register()
    yield emulated_cupy.NAME
    plugins.unregister_backend(emulated_cupy.NAME)


def kind_of(kernel: str) -> str:
    """Give an instantiation's name without the widths and the types of its arrays."""
    return re.sub(r"\b(ptx::\w+|scalar|float|double|\d\d+)\b", "", kernel)


def test_the_first_calls_go_through_every_kernel(emulated: str) -> None:
    import cuda_gate
    import cuda_gate_tensor_cores

    runtime = plugins.load_backend(emulated).runtime
    step = steps.step_of("kernels", f"{emulated}:cpu", 60.0)
    for name in calls.KERNELS:
        case, found = run_step("kernels", name, step)
        assert (case["outcome"], case["message"]) == ("passed", None), name
        assert any("kernel" in text for text in found["plan"])
    launched = set(map(kind_of, runtime.launches))
    known = {kind_of(name) for name, _ in cuda_gate.kernels()}
    known |= set(map(kind_of, cuda_gate_tensor_cores.kernels()))
    assert launched == known
    # The compiler at home sees the same kernels, and those of longer calls and of variants.
    listed = kernels.kernels()
    assert known <= {kind_of(name) for _, name in listed}
    assert any("constexpr int WARPS = 8;" in code for code, _ in listed)


def test_the_calls_under_tools_run_their_pullbacks(emulated: str) -> None:
    runtime = plugins.load_backend(emulated).runtime
    runtime.launches.clear()
    assert calls.make(f"{emulated}:cpu", list(calls.UNDER_TOOLS)) == len(calls.UNDER_TOOLS)
    launched = {kernel.partition("<")[0] for kernel in runtime.launches}
    assert launched >= {"scores_keys", "scores_mma_keys", "features_keys", "moments_vjp"}


@pytest.mark.parametrize(
    "changes",
    [variants.EIGHT_WARPS, variants.SCALE_IN_REGISTER],
    ids=["eight warps", "scale in a register"],
)
def test_a_variant_computes_the_same(emulated: str, changes: variants.Changes) -> None:
    backend = plugins.load_backend(emulated)
    name = "vjp-causal+sh(1,2)-bfloat16-lead=1-heads=4-rows=70-keys=83-dim=64-value_dim=64"
    one = calls.KERNELS[name]
    seen: list[str] = []
    compile_ = backend.runtime.compile

    def changed(code: str, kernel: str, shared: int = 0) -> Any:
        text = variants.changed(code, kernel, changes)
        if text != code:
            seen.append(kernel)
        return compile_(text, kernel, shared)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backend.runtime, "compile", changed)
        patched.setattr(backend.cache, "_compiled", {})
        with variants.constants_of(changes):
            calls.judge(f"{emulated}:cpu", one)
    assert {kernel.partition("<")[0] for kernel in seen} >= {"scores_mma_rows", "scores_mma_keys"}
