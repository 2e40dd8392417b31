"""The PTX wrappers: their results on the emulator, and that NVRTC compiles them without a GPU."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import cuda_on_cpu as cuda
import numpy as np
import pytest

bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
if shutil.which("g++") is None:
    pytest.skip("no g++", allow_module_level=True)

import pdcore_backends.cupy  # noqa: E402
from pdcore_backends.cupy.cubins import FLAGS as OF_CUPY  # noqa: E402
from pdcore_conformance.gpu.ptx_wrappers import (  # noqa: E402
    CODE,
    checks,
    difference,
    floats,
    round_to_16_bits,
    source,
    widen,
)

FOLDER = Path(pdcore_backends.cupy.__file__).parent / "kernels"
KINDS = ("ptx::f16", "ptx::bf16")
TURING = [
    *(f"convert<{kind}>" for kind in KINDS),
    *(f"load<{n}, {transposed}>" for n in (1, 2, 4) for transposed in ("false", "true")),
]
AMPERE = [
    *(f"multiply<{kind}>" for kind in KINDS),
    *(f"stages<{size}>" for size in (4, 8, 16)),
]
OPTIONS = (*OF_CUPY, f"-I{FOLDER}")
MODULE = cuda.RawModule(CODE, options=OPTIONS, name_expressions=TURING + AMPERE)
CHECKS = list(checks())
ON_CPU = {"array": np.ascontiguousarray, "empty": cuda.empty, "host": np.asarray}


@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_the_emulator_returns_the_expected_results(check: Any) -> None:
    for schedule in cuda.SCHEDULES if check.block == 32 else ("lockstep",):
        with cuda.using(schedule=schedule):
            assert difference(check, MODULE, **ON_CPU) == ""


def test_every_kernel_is_checked() -> None:
    assert {check.kernel for check in CHECKS} == {"exponential", *TURING, *AMPERE}
    assert {check.kernel for check in CHECKS if check.capability > 75} == set(AMPERE)


def test_a_wrong_wrapper_is_detected() -> None:
    [check] = [check for check in CHECKS if check.kernel == "convert<ptx::f16>"]
    code = CODE.replace("ptx::pack<T>(x[i], x[i / 2])", "ptx::pack<T>(x[i / 2], x[i])")
    module = cuda.RawModule(code, options=OPTIONS, name_expressions=[check.kernel])
    message = difference(check, module, **ON_CPU)
    assert re.match(
        r"convert<ptx::f16>, argument 3: \d+ of 212992 entries differ, the first", message
    )
    [check] = [check for check in CHECKS if check.kernel == "exponential"]
    code = CODE.replace(
        "= ptx::exp2_approximate(x[threadIdx.x])", "= 1.001f * exp2f(x[threadIdx.x])"
    )
    module = cuda.RawModule(code, options=OPTIONS, name_expressions=())
    assert "got 1.00" in difference(check, module, **ON_CPU)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_expected_conversions_agree_with_ml_dtypes(kind: str) -> None:
    dtype = np.dtype(np.float16 if kind == "float16" else bfloat16)
    name = {"float16": "f16", "bfloat16": "bf16"}[kind]
    x = floats(name)
    known = ~np.isnan(x)
    assert (round_to_16_bits(x, name)[known] == x.astype(dtype).view(np.uint16)[known]).all()
    bits = round_to_16_bits(x, name)
    np.testing.assert_array_equal(widen(bits, name), bits.view(dtype).astype(np.float32))


def test_tensor_cores_keep_subnormal_numbers() -> None:
    # PTX says so of mma; -ftz=true, among OPTIONS, is for the arithmetic of float32.
    tiny, one = np.float32(2.0**-130), np.float32(1)
    a, b = np.full((16, 16), tiny), np.full((16, 8), one)
    d = cuda.empty((16, 8))
    operands = (round_to_16_bits(x, "bf16") for x in (a, b))
    kernel = MODULE.get_function("multiply<ptx::bf16>")
    kernel((1,), (32,), (*operands, np.full((16, 8), tiny), d))
    assert (d == 17 * tiny).all()


def test_the_first_stage_is_there_before_the_second() -> None:
    [check] = [check for check in CHECKS if check.name == "cp.async of 16 bytes, 16 read"]
    x, early, late, read = check.arguments
    outputs = [cuda.empty(out.shape, np.int8) for out in (early, late)]
    MODULE.get_function(check.kernel)((1,), (32,), (x, *outputs, read))
    assert (outputs[0][1] == -1).all()  # the bytes of NaN, as the output was before


def test_turing_has_neither_mma_nor_cp_async():
    code = CODE.replace("__CUDA_ARCH__ >= 800", "1")
    module = cuda.RawModule(code, options=OPTIONS, name_expressions=["multiply<ptx::f16>"])
    with cuda.using(compute_capability="75"):
        cuda.RawModule(CODE, options=OPTIONS, name_expressions=TURING).compile()
        with pytest.raises(cuda.CompileError, match="mma_m16n8k16"):
            module.compile()


def test_inline_ptx_is_in_one_header():
    for path in FOLDER.iterdir():
        inline = re.search(r"\basm\b", path.read_text("utf-8"))
        assert (inline is not None) == (path.name == "ptx.cuh"), path


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_nvrtc_compiles_the_wrappers_without_cuda_headers(arch):
    from cupy.cuda import compiler

    log = io.StringIO()
    program = compiler._NVRTCProgram(
        source(),
        "wrappers.cu",
        name_expressions=TURING + (AMPERE if arch != "sm_75" else []),
        method="cubin",
    )
    cubin, _ = program.compile((*OF_CUPY, f"-arch={arch}", "--ptxas-options=-v"), log)
    assert cubin[:4] == b"\x7fELF"
    text = log.getvalue()
    assert text.count(" 0 bytes spill stores") == text.count("spill stores") > 8
