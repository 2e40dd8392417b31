"""The PTX wrappers of the CuPy backend's kernels, each with its expected result, bit by bit.

The expected results are computed here in NumPy. The tests check the emulator against them, and
`pdcore_conformance.gpu` checks a GPU, so the emulator can be relied on where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

__all__ = ["CODE", "Check", "Output", "checks", "compiled", "difference", "source"]

Array = np.ndarray[Any, Any]

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

// Lanes whose address ldmatrix does not read pass a misaligned one.
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
// Load the operands from row-major matrices into the layout that PTX documents.
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


class Output(NamedTuple):
    """An array that a kernel fills.

    Attributes
    ----------
    expected : array
        The first entries of the array, or all; entries after these are undefined.
    shape : tuple of int
        The shape of the whole array.
    rtol : float
        The relative tolerance; 0 for equal bits, where any NaN equals any other.
    """

    expected: Array
    shape: tuple[int, ...]
    rtol: float = 0.0


class Check(NamedTuple):
    """A kernel launch and its expected results.

    Attributes
    ----------
    name : str
        What is checked.
    kernel : str
        The name of a kernel in `CODE`.
    grid, block : int
        The number of blocks, and of threads in a block.
    arguments : tuple
        Arrays, NumPy numbers, and an `Output` for each result.
    capability : int
        The lowest compute capability that has the instruction, times 10.
    """

    name: str
    kernel: str
    grid: int
    block: int
    arguments: tuple[Any, ...]
    capability: int = 75


def source() -> str:
    """Return `CODE` with ``ptx.cuh`` pasted in, so that it compiles without an include path."""
    header = files("pdcore_backends.cupy") / "kernels" / "ptx.cuh"
    text = header.read_text(encoding="utf-8").replace("#pragma once\n", "")
    return CODE.replace('#include "ptx.cuh"', text)


def checks() -> Iterator[Check]:
    """Yield every check."""
    for name in ("f16", "bf16"):
        yield _conversions(name)
    yield _exponential()
    for count in (1, 2, 4):
        for transposed in (False, True):
            yield _ldmatrix(count, transposed)
    for name in ("f16", "bf16"):
        yield _mma(name)
    for bytes_, read in ((4, 4), (8, 8), (16, 16), (16, 10), (16, 0), (4, 1)):
        yield _cp_async(bytes_, read)


def compiled() -> dict[str, Any]:
    """Compile the PTX wrappers for CuPy's device.

    Returns
    -------
    dict
        The arguments of `difference`, and the ``capability`` of the device.
    """
    import cupy

    capability = int(cupy.cuda.Device().compute_capability)
    names = [check.kernel for check in checks() if check.capability <= capability]
    module = cupy.RawModule(
        code=source(), options=("-std=c++17",), name_expressions=tuple(dict.fromkeys(names))
    )

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        x = cupy.empty(shape, dtype)
        x.data.memset(0xFF, x.nbytes)
        return x

    return {
        "module": module,
        "capability": capability,
        "array": cupy.asarray,
        "empty": empty,
        "host": cupy.asnumpy,
    }


def difference(
    check: Check,
    module: Any,
    *,
    array: Callable[[Array], Any],
    empty: Callable[[tuple[int, ...], Any], Any],
    host: Callable[[Any], Array],
) -> str:
    """Launch a kernel and describe how its results differ from the expected ones.

    Parameters
    ----------
    check : Check
    module : object
        A `cupy.RawModule` of `source`, or an object with its ``get_function``.
    array, empty, host : callable
        Copy an array to the device, allocate one by shape and dtype, copy one back.

    Returns
    -------
    str
        The first difference; empty where there is none.
    """
    arguments: list[Any] = []
    for argument in check.arguments:
        if isinstance(argument, Output):
            arguments.append(empty(argument.shape, argument.expected.dtype))
        else:
            arguments.append(array(argument) if isinstance(argument, np.ndarray) else argument)
    module.get_function(check.kernel)((check.grid,), (check.block,), tuple(arguments))
    for index, (output, x) in enumerate(zip(check.arguments, arguments, strict=True)):
        if isinstance(output, Output):
            result = host(x).reshape(-1)[: output.expected.size]
            message = _differs(result, output.expected.reshape(-1), output.rtol)
            if message:
                return f"{check.kernel}, argument {index}: {message}"
    return ""


def _differs(result: Array, expected: Array, rtol: float) -> str:
    bits = np.dtype(f"u{expected.itemsize}")
    same = result.view(bits) == expected.view(bits)
    if expected.dtype.kind == "f":
        same |= np.isnan(result) & np.isnan(expected)
        with np.errstate(invalid="ignore"):
            same |= np.abs(result - expected) <= rtol * np.abs(expected)
    wrong = np.flatnonzero(~same)
    if not wrong.size:
        return ""
    i = wrong[0]
    return (
        f"{wrong.size} of {expected.size} entries differ, the first is {i}: got {result[i]} "
        f"({result.view(bits)[i]:#x}), expected {expected[i]} "
        f"({expected.view(bits)[i]:#x})"
    )


def round_to_16_bits(x: Array, name: str) -> Array:
    """Round floats to 16 bits, nearest with ties to even; return the bits. NaN is 0x7fff."""
    if name == "f16":
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = x.astype(np.float16).view(np.uint16)
    else:
        bits = x.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def widen(bits: Array, name: str) -> Array:
    """Return the float32 values of 16-bit floats that are given as bits."""
    if name == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def floats(name: str) -> Array:
    """Return every 16-bit float, the midpoints to their neighbours, and random float32 values."""
    rng = np.random.default_rng(0)
    exact = widen(np.arange(2**16, dtype=np.uint16), name)
    half = exact.view(np.uint32) + np.uint32(0x1000 if name == "f16" else 0x8000)
    any_bits = rng.integers(0, 2**32, 2**16, dtype=np.uint32)
    subnormal = (rng.standard_normal(2**14) * 2.0**-24).astype(np.float32)
    return np.concatenate([exact, half.view(np.float32), any_bits.view(np.float32), subnormal])


def _conversions(name: str) -> Check:
    x = floats(name)
    narrow = round_to_16_bits(x, name)
    second = narrow[np.arange(x.size) // 2].astype(np.uint32)
    pairs = narrow | second << np.uint32(16)
    results = [Output(y, y.shape) for y in (narrow, widen(narrow, name), pairs)]
    return Check(
        f"conversions, {name}",
        f"convert<ptx::{name}>",
        -(-x.size // 256),
        256,
        (x, *results, np.int32(x.size)),
    )


def _exponential() -> Check:
    values = [0, 1, -1, 10.5, -100.25, 127, 128, -126, -130, 1e-40, -np.inf, np.inf, np.nan]
    x = np.asarray(values, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp2(x)
    expected[expected < 2.0**-126] = 0
    # PTX documents an error of at most 2 units in the last place.
    return Check(
        "ex2.approx", "exponential", 1, x.size, (x, Output(expected, expected.shape, rtol=2.0**-22))
    )


def _ldmatrix(count: int, transposed: bool) -> Check:
    x = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    rows = np.ascontiguousarray(x.swapaxes(1, 2) if transposed else x)
    expected = rows.reshape(count, 64).view(np.uint32)
    suffix = ".trans" if transposed else ""
    return Check(
        f"ldmatrix.x{count}{suffix}",
        f"load<{count}, {str(transposed).lower()}>",
        1,
        32,
        (x, Output(expected, expected.shape)),
    )


def _mma(name: str) -> Check:
    rng = np.random.default_rng(1)
    # Sums of products of small integers are exact in float32.
    a, b, c = (
        rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8))
    )
    expected = a @ b + c
    return Check(
        f"mma.m16n8k16, {name}",
        f"multiply<ptx::{name}>",
        1,
        32,
        (round_to_16_bits(a, name), round_to_16_bits(b, name), c, Output(expected, expected.shape)),
        80,
    )


def _cp_async(bytes_: int, read: int) -> Check:
    x = np.random.default_rng(2).integers(0, 200, (2, 32, bytes_)).astype(np.int8)
    expected = np.where(np.arange(bytes_) < read, x, np.int8(0))
    # After the first wait only the first stage is sure to have arrived.
    early, late = Output(expected[0], x.shape), Output(expected, x.shape)
    return Check(
        f"cp.async of {bytes_} bytes, {read} read",
        f"stages<{bytes_}>",
        1,
        32,
        (x, early, late, np.int32(read)),
        80,
    )
