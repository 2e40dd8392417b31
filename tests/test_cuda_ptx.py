"""The wrappers of PTX: the emulator's against NumPy; NVRTC's without a GPU."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

cuda = pytest.importorskip("cuda_on_cpu")
bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
if shutil.which("g++") is None:
    pytest.skip("no g++", allow_module_level=True)

import pdcore_backends.cupy  # noqa: E402

pytestmark = pytest.mark.cuda

FOLDER = Path(pdcore_backends.cupy.__file__).parent / "kernels"
CODE = r"""
#include "ptx.cuh"

template <class T>
__global__ void convert(const float* x, T* narrow, float* wide, unsigned* pairs, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  narrow[i] = ptx::from_float<T>(x[i]);
  wide[i] = ptx::to_float(narrow[i]);
  pairs[i] = ptx::pack<T>(x[i], x[i / 2]);
}

extern "C" __global__ void exponential(const float* x, float* y) {
  y[threadIdx.x] = ptx::exp2_approximate(x[threadIdx.x]);
}

// Lanes whose address is not read give one that is wrong.
template <int N, bool transposed>
__global__ void load(const unsigned short* x, unsigned* y) {
  __shared__ __align__(16) unsigned short tile[N * 64];
  for (int i = threadIdx.x; i < N * 64; i += 32) tile[i] = x[i];
  __syncwarp();
  unsigned result[N];
  ptx::ldmatrix<transposed>(result, tile + (threadIdx.x < 8 * N ? 8 * threadIdx.x : 1));
  for (int i = 0; i < N; i++) y[32 * i + threadIdx.x] = result[i];
}

#if __CUDA_ARCH__ >= 800
// Operands by the documented layout, from matrices by rows.
template <class T>
__global__ void multiply(const unsigned short* a, const unsigned short* b, const float* c,
                         float* d) {
  const int g = threadIdx.x / 4, p = threadIdx.x % 4 * 2;
  const auto pair = [](unsigned short low, unsigned short high) {
    return low | (unsigned)high << 16;
  };
  unsigned left[4], right[2];
  float sum[4];
  for (int r = 0; r < 4; r++) {
    const unsigned short* from = a + (g + r % 2 * 8) * 16 + p + r / 2 * 8;
    left[r] = pair(from[0], from[1]);
    sum[r] = c[(g + r / 2 * 8) * 8 + p + r % 2];
  }
  for (int r = 0; r < 2; r++) right[r] = pair(b[(p + 8 * r) * 8 + g], b[(p + 8 * r + 1) * 8 + g]);
  ptx::mma_m16n8k16<T>(sum, left, right, sum);
  for (int r = 0; r < 4; r++) d[(g + r / 2 * 8) * 8 + p + r % 2] = sum[r];
}

template <int bytes>
__global__ void stages(const char* x, char* early, char* late, int source_bytes) {
  __shared__ __align__(16) char tile[2][32 * bytes];
  const int at = threadIdx.x * bytes;
  for (int stage = 0; stage < 2; stage++) {
    ptx::cp_async<bytes>(tile[stage] + at, x + stage * 32 * bytes + at, source_bytes);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  for (int i = 0; i < 2 * bytes; i++)
    early[i / bytes * 32 * bytes + at + i % bytes] = tile[i / bytes][at + i % bytes];
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 2 * bytes; i++)
    late[i / bytes * 32 * bytes + at + i % bytes] = tile[i / bytes][at + i % bytes];
}
#endif
"""
TYPES = {"ptx::f16": np.dtype(np.float16), "ptx::bf16": np.dtype(bfloat16)}
TURING = [
    *(f"convert<{kind}>" for kind in TYPES),
    *(f"load<{n}, {transposed}>" for n in (1, 2, 4) for transposed in ("false", "true")),
]
AMPERE = [
    *(f"multiply<{kind}>" for kind in TYPES),
    *(f"stages<{size}>" for size in (4, 8, 16)),
]
OPTIONS = ("-std=c++17", f"-I{FOLDER}")
MODULE = cuda.RawModule(CODE, options=OPTIONS, name_expressions=TURING + AMPERE)
rng = np.random.default_rng(0)


def launch(name, grid, block, *args):
    MODULE.get_function(name)((grid,), (block,), args)


def floats(dtype):
    """Every 16-bit number, what lies halfway to the next, and any others."""
    exact = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    bits = exact.view(np.uint32)
    half = bits + (0x1000 if dtype == np.float16 else 0x8000)
    any_bits = rng.integers(0, 2**32, 2**16, dtype=np.uint32)
    subnormal = (rng.standard_normal(2**14) * 2.0**-24).astype(np.float32)
    return np.concatenate([exact, half.view(np.float32), any_bits.view(np.float32), subnormal])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_conversions(kind):
    dtype = TYPES[kind]
    x = floats(dtype)
    narrow, pairs = cuda.empty(x.size, np.uint16), cuda.empty(x.size, np.uint32)
    wide = cuda.empty(x.size)
    launch(f"convert<{kind}>", -(-x.size // 256), 256, x, narrow, wide, pairs, np.int32(x.size))
    expected = x.astype(dtype).view(np.uint16)
    expected[np.isnan(x)] = 0x7FFF
    assert (narrow == expected).all()
    np.testing.assert_array_equal(wide, expected.view(dtype).astype(np.float32))
    second = expected[np.arange(x.size) // 2].astype(np.uint32)
    assert (pairs == expected | second << np.uint32(16)).all()


def test_exponential():
    x = np.array(
        [0, 1, -1, 10.5, -100.25, 127, 128, -126, -130, 1e-40, -np.inf, np.inf, np.nan], "f4"
    )
    y = cuda.empty(x.size)
    launch("exponential", 1, x.size, x, y)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp2(x)
    expected[expected < 2.0**-126] = 0
    np.testing.assert_allclose(y, expected, rtol=3e-7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix(n, transposed):
    x = np.arange(n * 64, dtype=np.uint16).reshape(n, 8, 8)
    y = cuda.empty((n, 32), np.uint32)
    launch(f"load<{n}, {str(transposed).lower()}>", 1, 32, x, y)
    rows = x.swapaxes(1, 2) if transposed else x
    assert (y.view(np.uint16).reshape(n, 8, 8) == rows).all()


@pytest.mark.parametrize("kind", TYPES)
def test_mma(kind):
    def draw(*shape):
        # Sums of these are exact in float32.
        return rng.integers(-8, 9, shape).astype(np.float32)

    a, b, c = draw(16, 16), draw(16, 8), draw(16, 8)
    d = cuda.empty((16, 8))
    narrow = [value.astype(TYPES[kind]).view(np.uint16) for value in (a, b)]
    launch(f"multiply<{kind}>", 1, 32, *narrow, c, d)
    assert (d == a @ b + c).all()


@pytest.mark.parametrize("schedule", cuda.SCHEDULES)
@pytest.mark.parametrize(("size", "source"), [(4, 4), (8, 8), (16, 16), (16, 10), (16, 0), (4, 1)])
def test_cp_async(size, source, schedule):
    x = rng.integers(0, 200, (2, 32, size)).astype(np.int8)
    early, late = cuda.empty(x.shape, np.int8), cuda.empty(x.shape, np.int8)
    with cuda.using(schedule=schedule):
        launch(f"stages<{size}>", 1, 32, x, early, late, np.int32(source))
    expected = np.where(np.arange(size) < source, x, 0)
    assert (late == expected).all()
    assert (early[0] == expected[0]).all()
    assert (early[1] == -1).all()  # NaN as a float, or two halves


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
    compiler = pytest.importorskip("cupy.cuda.compiler")
    log = io.StringIO()
    program = compiler._NVRTCProgram(
        CODE.replace('#include "ptx.cuh"', (FOLDER / "ptx.cuh").read_text("utf-8")),
        "wrappers.cu",
        name_expressions=TURING + (AMPERE if arch != "sm_75" else []),
        method="cubin",
    )
    cubin, _ = program.compile((f"-arch={arch}", "-std=c++17", "--ptxas-options=-v"), log)
    assert cubin[:4] == b"\x7fELF"
    said = log.getvalue()
    assert said.count(" 0 bytes spill stores") == said.count("spill stores") > 8
