// Subnormal numbers, which -ftz=true takes for 0.
#pragma once
#include <xmmintrin.h>

namespace cuda_on_cpu {

// Keep subnormal arguments and results, or take them for 0, as long as this lives. The processor
// does so for doubles too, whose subnormal numbers CUDA always keeps.
class Subnormals {
  static constexpr unsigned flush = 0x8040;  // of results, and of arguments
  const unsigned before;

 public:
  explicit Subnormals(bool kept) : before(_mm_getcsr()) {
    _mm_setcsr(kept ? before & ~flush : before | flush);
  }
  ~Subnormals() { _mm_setcsr(before); }
};

}  // namespace cuda_on_cpu
