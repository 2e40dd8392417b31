// Atomic operations and memory fences, relaxed as in CUDA; a fence tells ThreadSanitizer what it
// orders.
#pragma once
#include "device_math.h"
#include "runtime.h"

namespace cuda_on_cpu {

template <class T, class F>
inline T atomic(T* address, F change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are of 4 or 8 bytes");
  interleave();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do after = change(before);
  while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED));
  atomic_acquires();
  return before;
}

// The value is converted to the type of the variable, as in CUDA.
template <class T>
struct Same {
  using type = T;
};
template <class T>
using Value = typename Same<T>::type;

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_ATOMIC(name, expression)                          \
  template <class T>                                                  \
  inline T name(T* address, cuda_on_cpu::Value<T> value) {            \
    return cuda_on_cpu::atomic(address, [=](T old) -> T { return expression; }); \
  }                                                                   \
  template <class T>                                                  \
  inline T name##_block(T* address, cuda_on_cpu::Value<T> value) {    \
    return name(address, value);                                      \
  }

CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, old - value)
CUDA_ON_CPU_ATOMIC(atomicExch, (void(old), value))
CUDA_ON_CPU_ATOMIC(atomicMin, old < value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicMax, old > value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicAnd, old & value)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
CUDA_ON_CPU_ATOMIC(atomicDec, old == 0 || old > value ? value : T(old - 1))
#undef CUDA_ON_CPU_ATOMIC

template <class T>
inline T atomicCAS(T* address, cuda_on_cpu::Value<T> compare, cuda_on_cpu::Value<T> value) {
  static_assert(std::is_integral_v<T>, "atomicCAS is of integers");
  return cuda_on_cpu::atomic(address, [=](T old) { return old == compare ? value : old; });
}

inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() { cuda_on_cpu::fence(); }
inline void __threadfence_system() { cuda_on_cpu::fence(); }
