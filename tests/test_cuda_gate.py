"""Every CUDA kernel compiles for every architecture, and takes no more than the table says."""

from __future__ import annotations

import cuda_gate
import pytest

from pdcore_backends.cupy.feature_programs import FeatureProgram
from pdcore_backends.cupy.programs import Program

pytestmark = pytest.mark.cuda


def test_the_page_has_every_kernel_within_the_limits() -> None:
    table = cuda_gate.written()
    assert set(table) == set(cuda_gate.kernels())
    for key, use in table.items():
        assert use.spilled == 0, key
        assert max(use.registers) <= cuda_gate.MOST, key
        assert use.shared <= 48 * 1024, key  # what every device has without asking


def test_kernels_take_no_more_than_the_page_says() -> None:
    pytest.importorskip("cupy")
    table, found = cuda_gate.written(), cuda_gate.measured()
    more = {
        key: (use, table[key])
        for key, use in found.items()
        if use.spilled or use.shared != table[key].shared
        or any(a > b for a, b in zip(use.registers, table[key].registers, strict=True))
    }  # fmt: skip
    assert not more, f"if that is meant, run python tests/cuda_gate.py: {more}"


@pytest.mark.parametrize("name", ["scores_rows<256>", "scores_keys<256, false>"])
def test_programs_of_features_do_not_spill(name: str) -> None:
    pytest.importorskip("cupy")
    for arch in cuda_gate.ARCHITECTURES:
        assert cuda_gate._compiled(Program("float", "features").text(name), name, arch)[1] == 0


@pytest.mark.parametrize(
    ("scalar", "name"),
    [("float", "features_rows<128>"), ("float", "features_keys<128, false>"),
     ("double", "features_states<true>"), ("double", "features_keys<128, false>")],
)  # fmt: skip
def test_programs_of_log_features_do_not_spill(scalar: str, name: str) -> None:
    pytest.importorskip("cupy")
    program = FeatureProgram(scalar, "features", log=True)
    for arch in cuda_gate.ARCHITECTURES:
        assert cuda_gate._compiled(program.text(name), name, arch)[1] == 0


def test_a_kernel_that_spills_would_be_seen() -> None:
    pytest.importorskip("cupy")
    code = """__global__ void spills(float* x, int n) {
      float kept[64];
      for (int i = 0; i < 64; i++) kept[i] = x[i] * n;
      for (int i = 0; i < n; i++) x[i] = kept[(i * n) % 64];
    }"""
    assert cuda_gate._compiled(code, "spills", "sm_90")[1] > 0
