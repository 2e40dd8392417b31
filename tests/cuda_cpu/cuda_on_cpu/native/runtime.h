// The interface between the translation unit of a kernel and the runtime.
//
// Only the unit of the kernel is compiled with the sanitizer: every access to memory of the kernel is
// made there, where the sanitizer sees it.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct uint3 {
  unsigned x, y, z;
};

namespace cuda_on_cpu {

enum class State { ready, waiting, done };
enum class Schedule { lockstep, reversed, random, greedy, greedy_reversed };

// One cp.async that has not been waited for.
struct Copy {
  char* to;
  const char* from;
  int bytes, from_bytes, group;
};

constexpr int max_copies = 256;

struct Thread {
  uint3 index;
  unsigned id, lane, warp;
  State state;
  bool at_barrier;
  int line;              // of the operation that it waits in
  const char* waits_in;  // name of that operation
  int votes;             // result of a vote of the block
  void* offer;           // argument and result of an operation of its warp
  Copy copies[max_copies];
  int n_copies, group;
  void* stack_pointer;
  char* stack;
  void* fake_stack;  // AddressSanitizer's
  void* fiber;       // ThreadSanitizer's
  char order;        // ThreadSanitizer's: what happened before the thread goes on
};

// An array of the caller, copied to memory whose ends are checked, and back.
struct Region {
  char* host;
  size_t bytes;
  int argument;  // the first one that points into it
  int written;   // a pointer to it is not const
};

struct Pointer {
  int argument, region;
  size_t offset;
};

struct Launch {
  void (*body)(void** arguments);
  void** arguments;
  Region* regions;
  Pointer* pointers;
  int n_regions, n_pointers;
  unsigned grid[3], block[3];
  size_t shared, shared_limit, alignment;
  int schedule;
  unsigned seed;
  int flushes;  // whether subnormal floats are taken for 0
};

// The type of a parameter of a kernel; arguments.py has the same fields.
struct Parameter {
  int bytes;
  char kind;  // 'i' signed, 'u' unsigned, 'f' floating, 'b' bool, 'p' pointer, 'c' class
  int pointee_bytes;
  char pointee_kind;
  int pointee_const;
};

#pragma GCC visibility push(hidden)
extern Thread* self;
extern uint3 block_index, block_dim, grid_dim;

const char* run(Launch* launch);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void interleave();
int block_barrier(int line, int predicate);

void warp_barrier(unsigned mask, int line);
uint64_t shuffle(unsigned mask, uint64_t value, int source, const char* name, int line);
unsigned vote(unsigned mask, int predicate, const char* name, int line);

char* dynamic_shared(size_t alignment);
void* static_shared(const void* key, size_t bytes, size_t alignment);
void check_shared(const void* address, int bytes, const char* name, int line);

void mma_m16n8k16(bool bf16, float* d, const unsigned* a, const unsigned* b, const float* c, int line);
void exchange_rows(unsigned* result, int matrices, bool transposed, const uint16_t* row, int line);

void begin_copy(void* to, const void* from, int bytes, int from_bytes, int line);
void commit_copies();
bool next_copy(int keep_groups, Copy* copy);

void fence();           // __threadfence
void atomic_acquires(); // an atomic operation sees what was fenced before it
#pragma GCC visibility pop

// Conversions of bits, as in PTX.
inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline float bf16_to_float(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31;
  const uint32_t fraction = bits & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = float(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

inline uint16_t float_to_f16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (value != value) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {
    // The float's own addition rounds at 2^-24, the step of the subnormal numbers.
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

}  // namespace cuda_on_cpu
