"""The kernels are compiled here with the options with which CuPy compiles them."""

from __future__ import annotations

from typing import Any

import pytest

from pdcore_backends.cupy.cubins import FLAGS as OPTIONS
from pdcore_backends.cupy.runtime import OPTIONS as OWN


class CompiledError(Exception):
    """Raised where CuPy would compile the source of a kernel."""


def test_cupy_passes_these_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from cupy._core import core
    from cupy.cuda import compiler

    passed: list[tuple[str, ...]] = []

    def compile_(program: Any, options: tuple[str, ...], log_stream: Any = None) -> Any:
        if not program.src:  # CuPy preprocesses an empty text, to learn of the compiler's version
            return b"", None
        passed.append(options)
        raise CompiledError

    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler._NVRTCProgram, "compile", compile_)
    # That asks for a device.
    monkeypatch.setattr(
        compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{arch}", "cubin")
    )
    # `RawModule` with this call adds the folders of headers, of which the kernels include none.
    options = core.assemble_cupy_compiler_options(OWN)
    with pytest.raises(CompiledError):
        compiler._compile_module_with_cache(
            "__global__ void none() {}", options, arch="90", name_expressions=("none",)
        )
    [found] = passed
    assert sorted(x for x in found if not x.startswith("-I")) == sorted([*OPTIONS, "-arch=sm_90"])
