// The definitions for a CUDA source, included before the source, which needs no change.
#pragma once
#include "atomics.h"
#include "device_math.h"
#include "runtime.h"
#include "vector_types.h"

#define CUDA_ON_CPU 1
#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __maxnreg__(n)

#define threadIdx (cuda_on_cpu::self->index)
#define blockIdx (cuda_on_cpu::block_index)
#define blockDim (cuda_on_cpu::block_dim)
#define gridDim (cuda_on_cpu::grid_dim)
#define warpSize 32

// ---- shared memory: source.py replaces declarations by these

namespace cuda_on_cpu {

template <class T>
inline T* dynamic_shared_as(size_t alignment) {
  return reinterpret_cast<T*>(dynamic_shared(alignment > alignof(T) ? alignment : alignof(T)));
}

template <class Variable>
inline Variable& static_shared_as() {
  static const char key = 0;
  constexpr size_t alignment = alignof(Variable) > 16 ? alignof(Variable) : 16;
  return *static_cast<Variable*>(static_shared(&key, sizeof(Variable), alignment));
}

}  // namespace cuda_on_cpu

// ---- barriers and votes; __builtin_LINE() is the line of the caller

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::block_barrier(line, 0); }

inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::block_barrier(line, predicate);
}

inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::block_barrier(line, predicate) > 0;
}

inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::block_barrier(line, !predicate) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  cuda_on_cpu::warp_barrier(mask, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::vote(mask, predicate, "__ballot_sync", line);
}

inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::vote(mask, predicate, "__any_sync", line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::vote(mask, !predicate, "__all_sync", line) == 0;
}

// ---- shuffles

namespace cuda_on_cpu {

template <class T>
inline T shuffle_as(unsigned mask, T value, int source, const char* name, int line) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles are of numbers of 4 or 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source, name, line);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() { return int(self->lane); }
inline int segment(int width) { return lane() & ~(width - 1); }

}  // namespace cuda_on_cpu

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                     int line = __builtin_LINE()) {
  const int from = cuda_on_cpu::segment(width) + (source & (width - 1));
  return cuda_on_cpu::shuffle_as(mask, value, from, "__shfl_sync", line);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        int line = __builtin_LINE()) {
  const int from = cuda_on_cpu::lane() - int(delta);
  const int source = from < cuda_on_cpu::segment(width) ? cuda_on_cpu::lane() : from;
  return cuda_on_cpu::shuffle_as(mask, value, source, "__shfl_up_sync", line);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          int line = __builtin_LINE()) {
  const int from = cuda_on_cpu::lane() + int(delta);
  const bool inside = from < cuda_on_cpu::segment(width) + width;
  const int source = inside ? from : cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle_as(mask, value, source, "__shfl_down_sync", line);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                         int line = __builtin_LINE()) {
  const int from = cuda_on_cpu::lane() ^ lanes;
  const bool inside = from < cuda_on_cpu::segment(width) + width;
  const int source = inside ? from : cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle_as(mask, value, source, "__shfl_xor_sync", line);
}

// ---- loads and stores with a hint to the caches

#define CUDA_ON_CPU_LOAD(name) \
  template <class T>           \
  inline T name(const T* address) { return *address; }
#define CUDA_ON_CPU_STORE(name) \
  template <class T>            \
  inline void name(T* address, cuda_on_cpu::Value<T> value) { *address = value; }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwb)
#undef CUDA_ON_CPU_LOAD
#undef CUDA_ON_CPU_STORE

// ---- functions for PTX wrappers; they access memory here, in the translation unit of the kernel

namespace cuda_on_cpu {

template <class T, class... Others>
constexpr bool is_either = (std::is_same_v<T, Others> || ...);

template <int matrices>
inline void ldmatrix(unsigned (&result)[matrices], const void* row, bool transposed, int line) {
  uint16_t values[8] = {};
  if (lane() < 8 * matrices) {
    check_shared(row, 16, "ldmatrix", line);
    for (int i = 0; i < 8; i++) values[i] = static_cast<const volatile uint16_t*>(row)[i];
  }
  exchange_rows(result, matrices, transposed, values, line);
}

// The destination is NaN until the copy is waited for.
inline void cp_async(void* to, const void* from, int bytes, int from_bytes, int line) {
  begin_copy(to, from, bytes, from_bytes, line);
  for (int i = 0; i < from_bytes; i++) (void)static_cast<const volatile char*>(from)[i];
  for (int i = 0; i < bytes; i++) static_cast<volatile char*>(to)[i] = char(0xff);
}

inline void cp_async_wait(int keep_groups) {
  Copy copy;
  while (next_copy(keep_groups, &copy))
    for (int i = 0; i < copy.bytes; i++) copy.to[i] = i < copy.from_bytes ? copy.from[i] : 0;
}

}  // namespace cuda_on_cpu

// ---- launch and description of a kernel

namespace cuda_on_cpu {

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <auto kernel, class... A>
inline void body_as(void (*)(A...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>{});
}

template <auto kernel>
inline void body(void** arguments) {
  body_as<kernel>(kernel, arguments);
}

template <class T>
constexpr char kind() {
  if (std::is_pointer_v<T>) return 'p';
  if (std::is_same_v<T, bool>) return 'b';
  if (std::is_floating_point_v<T>) return 'f';
  if (std::is_integral_v<T> || std::is_enum_v<T>) return std::is_signed_v<T> ? 'i' : 'u';
  return 'c';
}

template <class T>
constexpr int bytes() {
  if constexpr (std::is_void_v<T> || std::is_function_v<T>)
    return 0;
  else
    return int(sizeof(T));
}

template <class T>
constexpr Parameter describe() {
  using To = std::remove_pointer_t<T>;
  using Plain = std::remove_cv_t<To>;
  if (!std::is_pointer_v<T>) return {int(sizeof(T)), kind<std::remove_cv_t<T>>(), 0, ' ', 0};
  const char pointee = std::is_void_v<Plain> ? ' ' : kind<Plain>();
  return {int(sizeof(T)), 'p', bytes<Plain>(), pointee, std::is_const_v<To>};
}

template <class... A>
inline int describe_all(void (*)(A...), Parameter* parameters) {
  int n = 0;
  ((parameters[n++] = describe<A>()), ...);
  return n;
}

}  // namespace cuda_on_cpu

// module.py appends one for each kernel.
#define CUDA_ON_CPU_KERNEL(number, ...)                                                     \
  extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_launch_##number( \
      cuda_on_cpu::Launch* launch) {                                                        \
    launch->body = &cuda_on_cpu::body<&__VA_ARGS__>;                                        \
    return cuda_on_cpu::run(launch);                                                        \
  }                                                                                         \
  extern "C" __attribute__((visibility("default"))) int cuda_on_cpu_describe_##number(      \
      cuda_on_cpu::Parameter* parameters) {                                                 \
    return cuda_on_cpu::describe_all(&__VA_ARGS__, parameters);                             \
  }
