"""The wrappers of PTX in the CuPy backend's kernels, each with what it has to give, bit by bit.

What they give is written here in NumPy; the tests hold the emulator to it, and
`pdcore_conformance.gpu` a GPU, so that either stands for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

__all__ = ["CODE", "Check", "Output", "checks", "difference", "source"]

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


class Output(NamedTuple):
    """An array that a kernel fills.

    Attributes
    ----------
    expected : array
        Its first entries, or all of them; what follows is not defined.
    shape : tuple of int
        Its own.
    rtol : float
        How far an entry may be off; 0 for the same bits, but for those of a NaN.
    """

    expected: Array
    shape: tuple[int, ...]
    rtol: float = 0.0


class Check(NamedTuple):
    """A launch, and what has to come of it.

    Attributes
    ----------
    name : str
        What is checked.
    kernel : str
        Of `CODE`.
    grid, block : int
    arguments : tuple
        Arrays, NumPy numbers, and an `Output` for each result.
    capability : int
        Of the oldest devices that have it.
    """

    name: str
    kernel: str
    grid: int
    block: int
    arguments: tuple[Any, ...]
    capability: int = 75


def source() -> str:
    """Give `CODE` with the wrappers in it, which needs no include path."""
    header = files("pdcore_backends.cupy") / "kernels" / "ptx.cuh"
    text = header.read_text(encoding="utf-8").replace("#pragma once\n", "")
    return CODE.replace('#include "ptx.cuh"', text)


def checks() -> Iterator[Check]:
    """Give every check."""
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


def difference(
    check: Check,
    module: Any,
    *,
    array: Callable[[Array], Any],
    empty: Callable[[tuple[int, ...], Any], Any],
    host: Callable[[Any], Array],
) -> str:
    """Launch, and say how the results differ from what is expected; nothing if they do not.

    Parameters
    ----------
    check : Check
    module : object
        A `cupy.RawModule` of `source`, or what stands for one.
    array, empty, host : callable
        Bring an array to the device, allocate one by shape and dtype, bring one back.
    """
    arguments: list[Any] = []
    for given in check.arguments:
        if isinstance(given, Output):
            arguments.append(empty(given.shape, given.expected.dtype))
        else:
            arguments.append(array(given) if isinstance(given, np.ndarray) else given)
    module.get_function(check.kernel)((check.grid,), (check.block,), tuple(arguments))
    for place, (given, made) in enumerate(zip(check.arguments, arguments, strict=True)):
        if isinstance(given, Output):
            found = host(made).reshape(-1)[: given.expected.size]
            why = _differs(found, given.expected.reshape(-1), given.rtol)
            if why:
                return f"{check.kernel}, argument {place}: {why}"
    return ""


def _differs(found: Array, expected: Array, rtol: float) -> str:
    bits = np.dtype(f"u{expected.itemsize}")
    same = found.view(bits) == expected.view(bits)
    if expected.dtype.kind == "f":
        same |= np.isnan(found) & np.isnan(expected)
        with np.errstate(invalid="ignore"):
            same |= np.abs(found - expected) <= rtol * np.abs(expected)
    wrong = np.flatnonzero(~same)
    if not wrong.size:
        return ""
    i = wrong[0]
    return (
        f"{wrong.size} of {expected.size} entries differ, the first is {i}: got {found[i]} "
        f"({found.view(bits)[i]:#x}), expected {expected[i]} "
        f"({expected.view(bits)[i]:#x})"
    )


def narrowed(x: Array, name: str) -> Array:
    """Round floats to 16 bits, to the nearest, ties to even, as integers; NaN is 0x7fff."""
    if name == "f16":
        with np.errstate(over="ignore", invalid="ignore"):
            found = x.astype(np.float16).view(np.uint16)
    else:
        bits = x.view(np.uint32).astype(np.uint64)
        found = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), found)


def widened(bits: Array, name: str) -> Array:
    """Give the floats of 16 bits."""
    if name == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def floats(name: str) -> Array:
    """Give every number of 16 bits, what lies halfway to the next, and any others."""
    rng = np.random.default_rng(0)
    exact = widened(np.arange(2**16, dtype=np.uint16), name)
    half = exact.view(np.uint32) + np.uint32(0x1000 if name == "f16" else 0x8000)
    any_bits = rng.integers(0, 2**32, 2**16, dtype=np.uint32)
    subnormal = (rng.standard_normal(2**14) * 2.0**-24).astype(np.float32)
    return np.concatenate([exact, half.view(np.float32), any_bits.view(np.float32), subnormal])


def _conversions(name: str) -> Check:
    x = floats(name)
    narrow = narrowed(x, name)
    second = narrow[np.arange(x.size) // 2].astype(np.uint32)
    pairs = narrow | second << np.uint32(16)
    results = [Output(y, y.shape) for y in (narrow, widened(narrow, name), pairs)]
    return Check(
        f"conversions, {name}",
        f"convert<ptx::{name}>",
        -(-x.size // 256),
        256,
        (x, *results, np.int32(x.size)),
    )


def _exponential() -> Check:
    numbers = [0, 1, -1, 10.5, -100.25, 127, 128, -126, -130, 1e-40, -np.inf, np.inf, np.nan]
    x = np.asarray(numbers, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp2(x)
    expected[expected < 2.0**-126] = 0
    # PTX promises 2 units in the last place.
    return Check(
        "ex2.approx", "exponential", 1, x.size, (x, Output(expected, expected.shape, rtol=2.0**-22))
    )


def _ldmatrix(count: int, transposed: bool) -> Check:
    x = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    rows = np.ascontiguousarray(x.swapaxes(1, 2) if transposed else x)
    expected = rows.reshape(count, 64).view(np.uint32)
    way = ".trans" if transposed else ""
    return Check(
        f"ldmatrix.x{count}{way}",
        f"load<{count}, {str(transposed).lower()}>",
        1,
        32,
        (x, Output(expected, expected.shape)),
    )


def _mma(name: str) -> Check:
    rng = np.random.default_rng(1)
    # Sums of these are exact in float32.
    a, b, c = (
        rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8))
    )
    expected = a @ b + c
    return Check(
        f"mma.m16n8k16, {name}",
        f"multiply<ptx::{name}>",
        1,
        32,
        (narrowed(a, name), narrowed(b, name), c, Output(expected, expected.shape)),
        80,
    )


def _cp_async(bytes_: int, read: int) -> Check:
    x = np.random.default_rng(2).integers(0, 200, (2, 32, bytes_)).astype(np.int8)
    expected = np.where(np.arange(bytes_) < read, x, np.int8(0))
    # After the first wait only the first stage is there for certain.
    early, late = Output(expected[0], x.shape), Output(expected, x.shape)
    return Check(
        f"cp.async of {bytes_} bytes, {read} read",
        f"stages<{bytes_}>",
        1,
        32,
        (x, early, late, np.int32(read)),
        80,
    )
