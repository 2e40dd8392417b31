"""The emulator of CUDA: the functions of kernels, launches, and refusals."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cuda_on_cpu as cuda
import numpy as np
import pytest

if shutil.which("g++") is None:
    pytest.skip("no g++", allow_module_level=True)

from cuda_on_cpu import compiler, source

KERNELS = r"""
// __shared__ int in_a_comment[4];
extern "C" __global__ void indices(int* y) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  y[block * threads + thread] = 1000 * block + thread;
}

template <class T>
__global__ void __launch_bounds__(32) shuffles(const T* x, T* y, int lane, int width) {
  const unsigned all = 0xffffffffu;
  const T mine = x[threadIdx.x];
  y[threadIdx.x] = __shfl_sync(all, mine, lane, width);
  y[32 + threadIdx.x] = __shfl_up_sync(all, mine, lane, width);
  y[64 + threadIdx.x] = __shfl_down_sync(all, mine, lane, width);
  y[96 + threadIdx.x] = __shfl_xor_sync(all, mine, lane, width);
}

extern "C" __global__ void votes(const int* x, unsigned* y, int* block) {
  const unsigned half = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
  const int mine = x[threadIdx.x];
  y[threadIdx.x] = __ballot_sync(half, mine);
  y[32 + threadIdx.x] = __any_sync(half, mine);
  y[64 + threadIdx.x] = __all_sync(half, mine);
  block[threadIdx.x] = __syncthreads_count(mine) * 4 + __syncthreads_or(mine) * 2 +
                       __syncthreads_and(mine);
}

struct Ends {
  int count;
  const float* from;
  float* to;
};

extern "C" __global__ void copy_by_structure(Ends ends, int past) {
  for (int i = threadIdx.x; i < ends.count + past; i += blockDim.x) ends.to[i] = ends.from[i];
}

template <class T>
__global__ void atomics(const T* x, T* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&y[0], x[i]);
  atomicMax(&y[1], x[i]);
  atomicMin(&y[2], x[i]);
}

extern "C" __global__ void compare_and_swap(const float* x, unsigned* greatest, unsigned* count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned seen = *greatest;
  while (__uint_as_float(seen) < x[i]) {
    const unsigned before = atomicCAS(greatest, seen, __float_as_uint(x[i]));
    if (before == seen) break;
    seen = before;
  }
  atomicInc(count, 99u);
  atomicExch(count + 1, 7u);
  atomicOr(count + 2, 1u << threadIdx.x % 32);
}

template <class T, int N>
__global__ void shared_memory(T* y) {
  __shared__ __align__(16) T first[N], second[2][N]; __shared__ int count;
  extern __shared__ __align__(128) unsigned char dynamic[];
  const int t = threadIdx.x;
  if (t == 0) count = N;
  first[t] = T(t);
  second[t % 2][t] = T(2 * t);
  reinterpret_cast<T*>(dynamic)[t] = T(3 * t);
  __syncthreads();
  const int other = count - 1 - t;
  y[t] = first[other] + second[other % 2][other] + reinterpret_cast<T*>(dynamic)[other];
  if (t == 0) y[N] = T(reinterpret_cast<size_t>(dynamic) % 128);
}

extern "C" __global__ void poisoned(float* y) {
  extern __shared__ float dynamic[];
  __shared__ float fixed[4];
  y[0] = dynamic[0];
  y[1] = fixed[3];
  dynamic[0] = fixed[3] = float(blockIdx.x);
}

extern "C" __global__ void functions(const float* x, float* y, int* z) {
  const float a = x[0], b = x[1], nan = x[2];
  y[0] = rsqrtf(a); y[1] = __expf(a); y[2] = __logf(a); y[3] = exp2f(a); y[4] = __fdividef(a, b);
  y[5] = max(a, nan); y[6] = min(nan, b); y[7] = fmaf(a, b, 1.0f); y[8] = __saturatef(a);
  y[9] = __powf(a, b); y[10] = normcdff(b); y[11] = tanhf(b); y[12] = erff(b); y[13] = __ldg(x);
  y[14] = __int_as_float(__float_as_int(a)); y[15] = make_float4(a, b, a, b).w;
  z[0] = max(-3, 2); z[1] = min(5u, 7u); z[2] = __popc(0xf0f0u); z[3] = __clz(1); z[4] = __ffs(8);
  z[5] = int(__brev(1u) >> 31); z[6] = int(__umulhi(1u << 31, 4u)); z[7] = warpSize;
}

struct Pair { int count; float factor; };

extern "C" __global__ void values(float* y, bool flag, long long wide, double real, Pair pair,
                                  const float* none) {
  y[0] = flag; y[1] = float(wide); y[2] = float(real); y[3] = pair.count * pair.factor;
  y[4] = none == nullptr;
}

extern "C" __global__ void copy(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  __syncthreads();
  y[i] = x[i];
}

extern "C" __global__ void deep(float* y) {
  volatile float large[100000];
  large[threadIdx.x] = 1.0f;
  y[0] = large[threadIdx.x];
}

extern "C" __global__ void nowhere(float* y) { y[1ll << 40] = 1.0f; }

extern "C" __global__ void stray(float* y) { if (threadIdx.x == 0) y[-1] = 1.0f; }

extern "C" __global__ void stuck(int* y) {
  if (threadIdx.x < 40) __syncwarp(0xffffffffu);
  else __syncthreads();
  y[0] = 1;
}
"""
NAMES = [
    *(f"shuffles<{kind}>" for kind in ("int", "float", "double", "long long")),
    *(f"atomics<{kind}>" for kind in ("int", "float", "double")),
    "shared_memory<float, 64>",
    "shared_memory<double, 32>",
]
MODULE = cuda.RawModule(code=KERNELS, options=("-std=c++17",), name_expressions=NAMES)


@pytest.fixture(params=cuda.SCHEDULES)
def schedule(request):
    with cuda.using(schedule=request.param, seed=5):
        yield request.param


def launch(name, grid, block, *args, **more):
    MODULE.get_function(name)(grid, block, args, **more)


def test_indices(schedule):
    grid, block = (3, 2, 2), (5, 4, 3)
    y = cuda.empty((12, 60), np.int32)
    launch("indices", grid, block, y)
    assert (y == 1000 * np.arange(12)[:, None] + np.arange(60)).all()


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("int", np.int32), ("float", np.float32), ("double", np.float64), ("long long", np.int64)],
)
def test_shuffles(kind, dtype, width, schedule):
    x = (1e3 * np.random.default_rng(0).standard_normal(32)).astype(dtype)
    y = cuda.empty((4, 32), dtype)
    launch(f"shuffles<{kind}>", (1,), (32,), x, y, np.int32(3), np.int32(width))
    lane = np.arange(32)
    first = lane // width * width
    up = np.where(lane - 3 >= first, lane - 3, lane)
    down = np.where(lane + 3 < first + width, lane + 3, lane)
    for result, lanes in zip(y, (first + 3, up, down, lane ^ 3), strict=True):
        assert (result == x[lanes]).all()


def test_votes(schedule):
    x = np.ones(32, np.int32)
    x[[3, 17]] = 0
    x[:16:2] = 0
    y, block = cuda.empty((3, 32), np.uint32), cuda.empty(32, np.int32)
    launch("votes", (1,), (32,), x, y, block)
    bits = (x.astype(np.uint32) << np.arange(32, dtype=np.uint32)).reshape(2, 16).sum(1)
    assert (y[0].reshape(2, 16) == bits[:, None]).all()
    assert (y[1] == 1).all()
    assert (y[2] == 0).all()
    assert (block == x.sum() * 4 + 2).all()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int", np.int32), ("float", np.float32), ("double", np.float64)]
)
def test_atomics(kind, dtype, schedule):
    x = np.random.default_rng(0).integers(-99, 99, 128).astype(dtype)
    y = np.zeros(3, dtype)
    launch(f"atomics<{kind}>", (2,), (64,), x, y)
    assert y.tolist() == [x.sum(), x.max(), x.min()]


def test_compare_and_swap(schedule):
    x = np.random.default_rng(0).random(128).astype(np.float32)
    greatest, count = np.zeros(1, np.uint32), np.zeros(3, np.uint32)
    launch("compare_and_swap", (2,), (64,), x, greatest, count)
    assert greatest.view(np.float32)[0] == x.max()
    assert count.tolist() == [128 - 100, 7, 2**32 - 1]


@pytest.mark.parametrize(("kind", "dtype", "n"), [("float", "f4", 64), ("double", "f8", 32)])
def test_shared_memory(kind, dtype, n, schedule):
    y = cuda.empty(n + 1, np.dtype(dtype))
    launch(f"shared_memory<{kind}, {n}>", (2,), (n,), y, shared_mem=n * y.itemsize)
    assert (y[:n] == 6 * np.arange(n)[::-1]).all()
    assert y[n] == 0


def test_shared_memory_holds_nan_in_every_block(schedule):
    y = np.zeros(2, np.float32)
    launch("poisoned", (3,), (1,), y, shared_mem=4)
    assert np.isnan(y).all()


def test_functions():
    a, b = np.float32(2.5), np.float32(0.75)
    y, z = cuda.empty(16), cuda.empty(8, np.int32)
    launch("functions", (1,), (1,), np.array([a, b, np.nan], np.float32), y, z)
    from math import erf, sqrt

    expected = [a**-0.5, np.exp(a), np.log(a), 2**a, a / b, a, b, a * b + 1, 1, a**b]
    expected += [(1 + erf(b / sqrt(2))) / 2, np.tanh(b), erf(b), a, a, b]
    np.testing.assert_allclose(y, expected, rtol=3e-7)
    assert z.tolist() == [2, 5, 8, 31, 4, 1, 2, 32]


def test_values_are_passed_by_width():
    pair = np.array([(3, 1.5)], [("count", "i4"), ("factor", "f4")])[0]
    y = cuda.empty(5)
    launch("values", (1,), (1,), y, np.bool_(True), 2**33, 0.25, pair, np.uint64(0))
    assert y.tolist() == [1, 2**33, 0.25, 4.5, 1]


def test_arrays_that_share_memory_share_it_in_the_kernel():
    whole = np.arange(8, dtype=np.float32)
    launch("copy", (1,), (4,), whole[2:], whole[4:], np.int32(2))
    assert whole.tolist() == [0, 1, 2, 3, 2, 3, 6, 7]


def test_an_array_without_elements():
    launch("copy", (1,), (4,), np.zeros(0, np.float32), np.zeros(0, np.float32), np.int32(0))


def test_barriers_do_not_wait_for_threads_that_returned(schedule):
    x, y = np.arange(70, dtype=np.float32), cuda.empty(70)
    launch("copy", (2,), (64,), x, y, np.int32(70))
    assert (y == x).all()


def test_the_example_of_the_readme_runs(capsys):
    page = (Path(__file__).parents[1] / "cuda_cpu" / "README.md").read_text("utf-8")
    example = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    exec(example, {})
    assert f"# {capsys.readouterr().out}" in example


def test_empty_is_poisoned():
    assert np.isnan(cuda.empty((2, 3))).all()
    assert np.isnan(cuda.empty((), np.float64))
    assert (cuda.empty(4, np.int16) == -1).all()
    assert np.isnan(cuda.empty(4, np.float16)).all()


@pytest.mark.parametrize(
    ("name", "block", "arguments", "message"),
    [
        ("stuck", (64,), [np.zeros(1, np.int32)], "deadlock: 32 threads wait for one another"),
        ("stray", (32,), [np.zeros(8, np.float32)], "byte -1 of argument 0, which has 32"),
        ("nowhere", (1,), [np.zeros(8, np.float32)], "which is in no array"),
        ("deep", (1,), [np.zeros(8, np.float32)], "more than its stack of 256 KiB"),
    ],
)
def test_errors_name_block_and_thread(name, block, arguments, message):
    with pytest.raises(cuda.EmulationError, match=message):
        launch(name, (1,), block, *arguments)
    # An error does not affect the next launch.
    test_indices("lockstep")


FLOATS, INT = np.zeros(4, np.float32), np.int32(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([FLOATS, FLOATS], "got 2 arguments, the kernel has 3"),
        ([FLOATS, FLOATS, 4], "argument 2: a Python int is passed as 8 bytes"),
        ([FLOATS, FLOATS, True], "argument 2: got bool"),
        ([FLOATS, FLOATS, np.float32(4)], "got float32 of 4 bytes, the kernel's .* int of 4"),
        ([FLOATS, FLOATS, np.int64(4)], "got int64 of 8 bytes, the kernel's .* int of 4"),
        ([FLOATS, FLOATS, FLOATS], "argument 2: got an array, the kernel's parameter is int"),
        ([FLOATS.astype(np.float16), FLOATS, INT], "array of float16, the kernel .* float of 4"),
        ([FLOATS.astype(np.int32), FLOATS, INT], "array of int32, the kernel points to float"),
        ([np.uint64(64), FLOATS, INT], "argument 0: got an address"),
        ([None, FLOATS, INT], "argument 0: got NoneType"),
        ([np.zeros(4, object), FLOATS, INT], "array of Python objects"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        launch("copy", (1,), (4,), *arguments)


def test_a_read_only_array_is_not_written():
    fixed = np.zeros(4, np.float32)
    fixed.flags.writeable = False
    launch("copy", (1,), (4,), fixed, FLOATS, INT)
    with pytest.raises(ValueError, match="argument 1: the array is read-only"):
        launch("copy", (1,), (4,), FLOATS, fixed, INT)


ENDS = np.dtype([("count", np.int32), ("from", np.uint64), ("to", np.uint64)], align=True)


def ends(arrays, count=4):
    value = np.zeros((), ENDS)
    value["count"] = count
    return cuda.Structure(value[()], arrays)


def test_pointers_in_a_structure():
    both = np.arange(8, dtype=np.float32)
    launch("copy_by_structure", (1,), (4,), ends({8: both[:4], 16: both[4:]}), np.int32(0))
    np.testing.assert_array_equal(both, [0, 1, 2, 3] * 2)
    x, y = np.ones(4, np.float32), cuda.empty(4)
    with pytest.raises(cuda.EmulationError, match="byte 16 of argument 0, which has 16"):
        launch("copy_by_structure", (1,), (4,), ends({8: x, 16: y}), np.int32(1))


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({4: FLOATS}, ValueError, "argument 0: got a pointer at byte 4, expected a multiple of 8"),
        ({24: FLOATS}, ValueError, "at byte 24, .* in a structure of 24"),
        ({8: np.zeros(4, object)}, TypeError, "array of Python objects"),
    ],
)
def test_structures_that_are_refused(arrays, error, message):
    with pytest.raises(error, match=message):
        launch("copy_by_structure", (1,), (4,), ends(arrays), np.int32(0))
    with pytest.raises(TypeError, match="got a structure, the kernel's parameter is a pointer"):
        launch("copy", (1,), (4,), ends({}), FLOATS, INT)


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((1,), (1025,), 0, "block: x is 1025, expected 1 to 1024"),
        ((1,), (32, 33), 0, "are 1056 threads"),
        ((1,), (1, 1, 65), 0, "block: z is 65"),
        ((0,), (1,), 0, "grid: x is 0"),
        ((1, 65536), (1,), 0, "grid: y is 65536"),
        ((1,), (1,), 48 * 1024 + 1, "max_dynamic_shared_size_bytes"),
    ],
)
def test_launches_that_are_refused(grid, block, shared, message):
    with pytest.raises(ValueError, match=message):
        launch("indices", grid, block, cuda.empty(4, np.int32), shared_mem=shared)
    with pytest.raises(TypeError, match="expected a tuple"):
        launch("indices", 1, (1,), cuda.empty(4, np.int32))


def test_more_shared_memory_must_be_requested():
    name = "shared_memory<float, 64>"
    kernel, y = MODULE.get_function(name), cuda.empty(65)
    assert kernel.max_dynamic_shared_size_bytes == 48 * 1024
    # Static shared arrays count, too.
    with pytest.raises(cuda.EmulationError, match=r"dynamic and static; .* may have 49152"):
        kernel((1,), (64,), (y,), shared_mem=48 * 1024)
    with pytest.raises(ValueError, match="sm_90 has 232448 for a block"):
        kernel.max_dynamic_shared_size_bytes = 228 * 1024
    with cuda.using(compute_capability="75"), pytest.raises(ValueError, match="sm_75 has 65536"):
        kernel.max_dynamic_shared_size_bytes = 65 * 1024
    kernel.max_dynamic_shared_size_bytes = 100 * 1024
    kernel((1,), (64,), (y,), shared_mem=99 * 1024)
    assert (y[:64] == 6 * np.arange(64)[::-1]).all()
    # The larger limit holds for this kernel only.
    assert MODULE.get_function(name).max_dynamic_shared_size_bytes == 48 * 1024


def test_names_and_options_are_checked():
    with pytest.raises(ValueError, match=r"no kernel 'none'; known: shuffles<int>, .*, indices"):
        MODULE.get_function("none")
    with pytest.raises(ValueError, match="options: '--device-debug' is not known"):
        cuda.RawModule(KERNELS, options=("--device-debug",)).compile()
    with pytest.raises(TypeError, match="expected a tuple"):
        cuda.RawModule(KERNELS, options="-std=c++17")
    with pytest.raises(TypeError, match="not a cubin"):
        cuda.RawModule()
    with pytest.raises(ValueError, match="schedule: got 'fair', expected one of"):
        cuda.Settings(schedule="fair")
    with pytest.raises(ValueError, match="sanitize: got 'memory'"):
        cuda.environment("memory")


FLUSHED = r"""
extern "C" __global__ void flushed(const float* x, float* y, const double* z, double* w) {
  const float tiny = x[0], small = x[1], two = x[2];  // 1e-39, 1e-20 and 2
  y[0] = tiny + tiny; y[1] = small * small; y[2] = tiny > 0; y[3] = tiny * 1e30f; y[4] = logf(tiny);
  y[5] = 1.0f / (1e19f * 1e19f * two); y[6] = sqrtf(tiny); y[7] = powf(tiny, 0.5f);
  y[8] = float(z[0]); y[9] = small * 1e-17f; y[10] = max(tiny, tiny + 0.0f); y[11] = tiny;
  w[0] = z[0] * 1e-200; w[1] = double(tiny);
}
"""


@pytest.mark.parametrize("option", ["-ftz=true", "--ftz=true", "-ftz=false", ""])
def test_subnormal_floats_are_flushed_as_the_compiler_is_told(option):
    module = cuda.RawModule(FLUSHED, options=(option,) if option else ())
    x, z = np.array([1e-39, 1e-20, 2], np.float32), np.array([1e-39])
    y, w = cuda.empty(12), cuda.empty(2, np.float64)
    module.get_function("flushed")((1,), (1,), (x, y, z, w))
    tiny, small, two = x.tolist()
    kept = [2 * tiny, small**2, 1, tiny * 1e30, np.log(tiny), 0.5e-38, tiny**0.5, tiny**0.5]
    kept += [tiny, small * 1e-17, tiny]
    flushed = [0, 0, 0, 0, -np.inf, 0, 0, 0, 0, small * 1e-17, 0]
    if "true" in option:
        np.testing.assert_allclose(y[:11], flushed, rtol=1e-6)
    else:
        np.testing.assert_allclose(y[:11], kept, rtol=1e-5)
    assert y[11] == x[0]  # a copy computes nothing
    np.testing.assert_allclose(w, [1e-239, 0 if "true" in option else tiny])
    assert x[0] * two > x[0]  # NumPy computes as before


def test_compile_errors_name_the_line():
    code = '\n\nextern "C" __global__ void f(int* y) { y[0] = missing; }\n'
    with pytest.raises(cuda.CompileError, match=r"kernel\.cu:3:.*missing"):
        cuda.RawModule(code).compile()


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_SCHEDULE", "greedy")
    monkeypatch.setenv("CUDA_ON_CPU_SEED", "7")
    with cuda.using(compute_capability="80") as settings:
        assert settings == cuda.Settings("greedy", 7, "80", "")
    monkeypatch.setenv("CUDA_ON_CPU_SANITIZE", "thread")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(RuntimeError, match=r"cuda_on_cpu\.environment\('thread'\)"):
        cuda.RawModule('extern "C" __global__ void f() {}').compile()


def test_a_build_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_CACHE", str(tmp_path))
    (tmp_path / "width.h").write_text("constexpr int width = 3;")
    code = '#include "width.h"\nextern "C" __global__ void f(int* y) { y[0] = width; }'

    def run():
        y = cuda.empty(1, np.int32)
        cuda.RawModule(code, options=(f"-I{tmp_path}",)).get_function("f")((1,), (1,), (y,))
        return y[0]

    real = compiler.run

    def only_reads(arguments, code=None):
        assert "-shared" not in arguments
        return real(arguments, code)

    assert run() == 3
    with monkeypatch.context() as patched:
        patched.setattr(compiler, "run", only_reads)
        assert run() == 3
    (tmp_path / "width.h").write_text("constexpr int width = 4;")
    assert run() == 4
    assert len(list(tmp_path.glob("kernel-*.so"))) == 2
    # No temporary files are left.
    assert {path.suffix for path in tmp_path.iterdir()} == {".so", ".o", ".h"}


def test_a_module_keeps_no_stacks():
    # A stack needs two memory maps, of which a process has 65,530: 128 modules of 256 threads.
    def mappings():
        return len(Path("/proc/self/maps").read_text().splitlines())

    code = 'extern "C" __global__ void mark(float* x) { x[threadIdx.x] = %d; }'
    x = cuda.empty(256)
    for i in range(2):
        kernel = cuda.RawModule(code=code % i).get_function("mark")
        before = mappings()
        kernel((1,), (256,), (x,))
        assert (x == i).all()
        assert mappings() - before < 100


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("__shared__ float (*x)[3], y;", "is not understood"),
        ("extern __shared__ float x[4];", "expected an array without size"),
    ],
)
def test_declarations_that_are_refused(declaration, message):
    with pytest.raises(ValueError, match=message):
        source.translate(declaration)
