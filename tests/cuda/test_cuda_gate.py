"""Every CUDA kernel compiles for every architecture, within the resources of the table."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import cuda_gate
import cuda_gate_programs
import cuda_gate_tensor_cores
import pytest

import pdcore
from pdcore.spec import kernels
from pdcore_backends.cupy import feature_programs, tensor_cores
from pdcore_backends.cupy.programs import COLUMNS, Program, memory, tile


def test_the_page_has_every_kernel_within_the_limits() -> None:
    table = cuda_gate.written()
    assert set(table) == set(cuda_gate.kernels())
    for key, use in table.items():
        assert use.spilled == 0, key
        assert max(use.registers) <= cuda_gate.MOST, key
        assert use.shared <= 48 * 1024, key  # the limit of every device by default


def test_kernels_take_no_more_than_the_page_says() -> None:
    table, usages = cuda_gate.written(), cuda_gate.measured()
    more = {
        key: (use, table[key])
        for key, use in usages.items()
        if use.spilled
        or use.shared != table[key].shared
        or any(a > b for a, b in zip(use.registers, table[key].registers, strict=True))
    }
    assert not more, f"if that is meant, run python tests/cuda/cuda_gate.py: {more}"


def test_programs_take_no_more_than_the_page_says_and_never_spill() -> None:
    table = cuda_gate_programs.written()
    assert set(table) == set(cuda_gate_programs.programs())
    for what, (*registers, spilled) in cuda_gate_programs.measured().items():
        *most, none = table[what]
        assert spilled == none == 0, what
        assert all(a <= b for a, b in zip(registers, most, strict=True)), what


def test_tensor_cores_take_no_more_than_the_page_says_and_never_spill() -> None:
    table = cuda_gate_tensor_cores.written()
    assert set(table) == set(cuda_gate_tensor_cores.kernels())
    for name, use in table.items():
        assert use.shared <= 99 * 1024, name  # what every device since sm_80 has
    for name, use in cuda_gate_tensor_cores.measured().items():
        assert use.spilled == table[name].spilled == 0, name
        assert use.shared == table[name].shared, name
        assert all(a <= b for a, b in zip(use.registers, table[name].registers, strict=True)), name


@pytest.mark.parametrize("spec", cuda_gate_programs.SPECS[:2])
def test_expressions_do_not_spill_on_tensor_cores(spec: str) -> None:
    expression = cuda_gate_programs.lowered(spec).expression
    program = replace(cuda_gate_tensor_cores.program("float16"), expression=expression)
    for arch in cuda_gate_tensor_cores.ARCHITECTURES:
        for name in (
            "scores_mma<128, 128>",
            "scores_mma_rows<128, 128, float>",
            "scores_mma_keys<128, 128, float, float>",
        ):
            assert cuda_gate.compiled(program.text(name), name, arch)[1] == 0, (name, arch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("arch", cuda_gate_tensor_cores.ARCHITECTURES)
def test_products_are_instructions_of_tensor_cores(arch: str, dtype: str) -> None:
    name, keys = ("scores_mma<64, 64>", 64) if dtype == "float16" else ("scores_mma<32, 96>", 32)
    dim, value_dim = cuda_gate_tensor_cores.sizes(name)
    # Products of 16 by 8 by 16, for 32 rows of a warp and a tile of keys.
    of_keys, of_values = keys // 8 * dim // 16, keys // 16 * value_dim // 8
    counts = cuda_gate_tensor_cores.instructions(name, arch, dtype)
    assert counts["HMMA"] == 2 * (of_keys + of_values)
    # Two loads of queries for each 16 columns; then one load of four matrices for two products.
    assert counts["LDSM"] == 2 * dim // 16 + (of_keys + of_values) // 2
    assert counts["LDGSTS"] > 0


def assert_constants(program: Program, kernel: str, expected: dict[str, int]) -> None:
    """Assert, by the compiler, that constants of a kernel's text have expected values."""
    lines = [
        f'static_assert({name} == {value}, "{name} is not {value}");'
        for name, value in expected.items()
    ]
    code = "\n".join([program.text(kernel), *lines, "__global__ void none() {}"])
    cuda_gate.assembled(code, "none", "sm_80")


@pytest.mark.parametrize("spec", ["softmax", "polynomial"])
def test_launches_on_tensor_cores_take_the_shared_memory_of_the_kernels(spec: str) -> None:
    expression = cuda_gate_programs.lowered(spec).expression
    program = replace(cuda_gate_tensor_cores.program(), expression=expression)
    expected = {"MMA_THREADS": tensor_cores.THREADS}
    for dim, value_dim in product(tensor_cores.WIDTHS, repeat=2):
        widths = f"<{dim}, {value_dim}>"
        expected |= {
            f"Forward{widths}::BYTES": tensor_cores.memory(dim, value_dim, expression is None),
            f"Backward{widths}::BYTES": tensor_cores.pullback_memory(dim, value_dim),
            f"Forward{widths}::ROWS": tensor_cores.ROWS,
            f"Backward{widths}::OWN": tensor_cores.OWN,
        }
    assert_constants(program, "scores_mma_rows<32, 32, float>", expected)


@pytest.mark.parametrize("scalar", cuda_gate.SCALARS)
def test_launches_on_cuda_cores_take_the_shared_memory_of_the_kernels(scalar: str) -> None:
    sizes = {
        f"Memory<{columns}>::BYTES": memory(scalar, columns)
        for columns in (*COLUMNS, *feature_programs.COLUMNS)
    }
    assert_constants(Program(scalar), "scores_forward<32>", {"SIZE": tile(scalar), **sizes})


def test_shared_memory_that_differs_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="SIZE is not 63"):
        assert_constants(Program("float"), "scores_forward<32>", {"SIZE": 63})


BUILT_IN = ("softmax", "gaussian(gamma=0.3)", "cosine", "polynomial")


def test_every_built_in_expression_has_a_program() -> None:
    kinds = {type(pdcore.parse(spec).kernel) for spec in BUILT_IN}
    own = [kind for kind in vars(kernels).values() if isinstance(kind, type)]
    assert kinds == {
        kind
        for kind in own
        if issubclass(kind, kernels.Kernel)
        and not issubclass(kind, kernels.FeatureMap)
        and kind not in (kernels.Kernel, kernels.PointwiseKernel)
    }
    for spec in BUILT_IN:
        expression = cuda_gate_programs.lowered(spec).expression
        assert expression is None or expression in cuda_gate_programs.expressions(), spec


def test_a_kernel_that_spills_would_be_seen() -> None:
    code = """__global__ void spills(float* x, int n) {
      float kept[64];
      for (int i = 0; i < 64; i++) kept[i] = x[i] * n;
      for (int i = 0; i < n; i++) x[i] = kept[(i * n) % 64];
    }"""
    assert cuda_gate.compiled(code, "spills", "sm_90")[1] > 0
