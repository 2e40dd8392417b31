// Wrappers of PTX instructions: the only inline PTX of the project. No CUDA headers are needed.
//
// Where CUDA_ON_CPU is defined, the wrappers call the emulator of the tests, which declares the
// functions that they call. The emulator has not been compared with a GPU yet.
//
// The conversions and ldmatrix need sm_75; mma of 16 x 8 x 16 and cp.async need sm_80.
#pragma once

#ifdef CUDA_ON_CPU
#define PTX_LINE , int line = __builtin_LINE()  // in the kernel, for the emulator
#else
#define PTX_LINE
#endif

namespace ptx {

// 16-bit floating point numbers, stored as their bits.
struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

// ---- conversions, rounded to nearest, ties to even

__device__ __forceinline__ float to_float(bf16 value) {
  return __uint_as_float((unsigned)value.bits << 16);
}

__device__ __forceinline__ float to_float(f16 value) {
#ifdef CUDA_ON_CPU
  return cuda_on_cpu::f16_to_float(value.bits);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ f16 from_float<f16>(float value) {
#ifdef CUDA_ON_CPU
  return f16{cuda_on_cpu::float_to_f16(value)};
#else
  f16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#endif
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
#if defined(CUDA_ON_CPU)
  return bf16{cuda_on_cpu::float_to_bf16(value)};
#elif __CUDA_ARCH__ >= 800
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const unsigned bits = __float_as_uint(value);
  const unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return bf16{(unsigned short)(value != value ? 0x7fff : rounded)};
#endif
}

// Two numbers in a register; `low`, in the lower half, is the first of two adjacent ones in memory.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  return (unsigned)from_float<T>(low).bits | (unsigned)from_float<T>(high).bits << 16;
}

#if !defined(CUDA_ON_CPU) && __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ unsigned pack<f16>(float low, float high) {
  unsigned result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

template <>
__device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
  unsigned result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
#endif

// 2^x within 2 units in the last place; subnormal arguments and results are treated as 0.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef CUDA_ON_CPU
  const float result = exp2f(fabsf(x) < 0x1p-126f ? 0.0f : x);
  return result < 0x1p-126f ? 0.0f : result;
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// ---- ldmatrix: N matrices of 8 x 8 numbers of 16 bits from shared memory
//
// Lane 8 m + i passes the address of row i of matrix m, a multiple of 16 bytes; the addresses of
// the other lanes are ignored. Lane l gets the numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or
// with `transposed` of that row of the transposed matrix.

#ifndef CUDA_ON_CPU
__device__ __forceinline__ unsigned shared_address(const void* address) {
  return (unsigned)__cvta_generic_to_shared(address);
}
#endif

#ifdef CUDA_ON_CPU
template <bool transposed = false, int N>
__device__ __forceinline__ void ldmatrix(unsigned (&result)[N], const void* row PTX_LINE) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix reads 1, 2 or 4 matrices");
  cuda_on_cpu::ldmatrix(result, row, transposed, line);
}
#else
template <bool transposed = false>
__device__ __forceinline__ void ldmatrix(unsigned (&result)[1], const void* row) {
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(result[0]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(result[0]) : "r"(shared_address(row)) : "memory");
}

template <bool transposed = false>
__device__ __forceinline__ void ldmatrix(unsigned (&result)[2], const void* row) {
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(result[0]), "=r"(result[1]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(result[0]), "=r"(result[1]) : "r"(shared_address(row)) : "memory");
}

template <bool transposed = false>
__device__ __forceinline__ void ldmatrix(unsigned (&result)[4], const void* row) {
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row)) : "memory");
}
#endif

#if __CUDA_ARCH__ >= 800

// ---- mma: d = a b + c by a warp; a (16, 16) row-major, b (16, 8) column-major, c, d (16, 8) float
//
// With g = l / 4 and p = 2 (l % 4), lane l holds: of a, rows g and g + 8 of columns p, p + 1 (a[0],
// a[1]) and of p + 8, p + 9 (a[2], a[3]); of b, rows p, p + 1 (b[0]) and p + 8, p + 9 (b[1]) of column
// g; of c and d, columns p, p + 1 of row g (0, 1) and of row g + 8 (2, 3).

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2], const float (&c)[4] PTX_LINE);

#define PTX_MMA(type)                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                      \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"               \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),      \
                 "f"(c[1]), "f"(c[2]), "f"(c[3]))

#ifdef CUDA_ON_CPU
template <class T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                  const float (&c)[4], int line) {
  static_assert(cuda_on_cpu::is_either<T, f16, bf16>, "mma is of f16 or bf16");
  cuda_on_cpu::mma_m16n8k16(cuda_on_cpu::is_either<T, bf16>, d, a, b, c, line);
}
#else
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const unsigned (&a)[4],
                                                  const unsigned (&b)[2], const float (&c)[4]) {
  PTX_MMA("f16");
}

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const unsigned (&a)[4],
                                                   const unsigned (&b)[2], const float (&c)[4]) {
  PTX_MMA("bf16");
}
#endif
#undef PTX_MMA

// ---- cp.async: copy 4, 8 or 16 bytes from global to shared memory while the thread continues
//
// Only the first `source_bytes` are read; the rest of the destination is set to 0. Both addresses
// are multiples of `bytes`. The thread sees its copies after `cp_async_wait`, other threads after a
// barrier that follows it.

template <int bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global,
                                         int source_bytes = bytes PTX_LINE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef CUDA_ON_CPU
  cuda_on_cpu::cp_async(shared, global, bytes, source_bytes, line);
#else
  // Bypass the first-level cache where possible: this multiprocessor does not read the bytes again.
  if (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(source_bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(shared_address(shared)), "l"(global), "n"(bytes), "r"(source_bytes)
                 : "memory");
#endif
}

// Make a group of the copies since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#ifdef CUDA_ON_CPU
  cuda_on_cpu::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most the last `groups` groups are unfinished.
template <int groups>
__device__ __forceinline__ void cp_async_wait() {
#ifdef CUDA_ON_CPU
  cuda_on_cpu::cp_async_wait(groups);
#else
  asm volatile("cp.async.wait_group %0;" :: "n"(groups) : "memory");
#endif
}

#endif  // __CUDA_ARCH__ >= 800

}  // namespace ptx

#undef PTX_LINE
