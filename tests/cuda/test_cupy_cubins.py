"""Kernels that NVRTC compiled before, without a GPU, are loaded in place of their source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cupy
import pytest

from pdcore_backends.cupy import cubins
from pdcore_backends.cupy.impl import CupyRuntime
from pdcore_conformance.gpu import kernels as gpu_kernels
from pdcore_conformance.gpu import prepare

CODE = "template <int N> __global__ void add(float* x) { x[threadIdx.x] += N; }"
NAMES = ("add<1>", "add<2>")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cubins.save(tmp_path, [(CODE, name) for name in NAMES], "sm_90")
    monkeypatch.setenv(cubins.FOLDER, str(tmp_path))
    return tmp_path


class Module:
    """A stand-in for `cupy.RawModule`, which needs a GPU; its kernel is what was asked of it."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments

    def get_function(self, name: str) -> Any:
        return self.arguments, name


class Device:
    compute_capability = "90"


def test_a_kernel_is_loaded_from_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy, "RawModule", Module)
    monkeypatch.setattr(cupy.cuda, "Device", Device)
    symbols = set()
    for name in NAMES:
        arguments, symbol = CupyRuntime().compile(CODE, name)  # type: ignore[misc]
        binary = Path(arguments["path"]).read_bytes()
        assert binary[:4] == b"\x7fELF"
        assert symbol.encode() in binary
        symbols.add(symbol)
    assert len(symbols) == len(NAMES)


@pytest.mark.parametrize(
    ("code", "name", "capability"),
    [(CODE + " ", "add<1>", "90"), (CODE, "add<3>", "90"), (CODE, "add<1>", "80")],
)
def test_any_other_kernel_is_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, name: str, capability: str
) -> None:
    monkeypatch.setattr(cupy, "RawModule", Module)
    monkeypatch.setattr(cupy.cuda, "Device", Device)
    monkeypatch.setattr(Device, "compute_capability", capability)
    arguments, asked = CupyRuntime().compile(code, name)  # type: ignore[misc]
    assert (arguments["code"], asked) == (code, name)


def test_kernels_are_prepared_for_a_run_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_kernels, "kernels", lambda: [(CODE, name) for name in NAMES])
    prepare.compile_kernels(tmp_path)
    monkeypatch.setenv(cubins.FOLDER, str(tmp_path))
    for name in NAMES:
        found = cubins.find(CODE, name, gpu_kernels.ARCHITECTURE)
        assert found is not None
        assert found.path.exists()


def test_a_folder_without_kernels_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cubins.FOLDER, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=f"{cubins.FOLDER} is .*expected a folder"):
        cubins.find(CODE, "add<1>", "sm_90")


def test_wrong_code_is_an_error_of_the_compiler() -> None:
    from cupy.cuda.compiler import CompileException

    with pytest.raises(CompileException, match="add"):
        cubins.assemble("__global__ void add( {", "add", "sm_90")
